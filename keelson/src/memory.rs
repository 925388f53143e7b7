//! Memory that only the start needs, and how little of it is kept.

use std::{ffi::c_int, ptr};

use nix::libc;

/// How many heaps the threads share. The allocator would give each thread one of its own, and what is
/// free in one can't be used in another.
const ARENAS: c_int = 2;

/// Has all threads share a few heaps. To be called before there are threads.
pub(crate) fn share_heaps() {
    #[cfg(target_env = "gnu")]
    // SAFETY: it sets a number; no other thread allocates yet.
    unsafe {
        libc::mallopt(libc::M_ARENA_MAX, ARENAS);
    }
}

/// Gives back what the start needed: free memory of the heaps, and the pages of the program, of which
/// a node that is up uses a tenth. The kernel reads back what is used again.
pub(crate) fn give_back() {
    #[cfg(target_env = "gnu")]
    // SAFETY: there is no pointer to get wrong, and any thread may call it at any time.
    unsafe {
        libc::malloc_trim(0);
    }
    // SAFETY: the function is one that may be called so, and needs no data.
    unsafe {
        libc::dl_iterate_phdr(Some(forget_segments), ptr::null_mut());
    }
}

/// Unmaps the pages of a loaded object that nothing ever wrote to, so that they are as the file has
/// them. Ends the walk after the first object, which is the program (`dl_iterate_phdr(3)`).
unsafe extern "C" fn forget_segments(
    object: *mut libc::dl_phdr_info,
    _size: libc::size_t,
    _data: *mut libc::c_void,
) -> c_int {
    // SAFETY: the loader hands a valid description that lives as long as this call.
    let object = unsafe { &*object };
    let count = usize::from(object.dlpi_phnum);
    // SAFETY: the loader says so: that many headers stand there, for as long as the program runs.
    let headers = unsafe { std::slice::from_raw_parts(object.dlpi_phdr, count) };
    let read_only =
        headers.iter().filter(|h| h.p_type == libc::PT_LOAD && h.p_flags & libc::PF_W == 0);
    // SAFETY: it reads a number that the kernel gave the process at its start.
    let page = unsafe { libc::getauxval(libc::AT_PAGESZ) }.max(1);
    for header in read_only {
        let start = (object.dlpi_addr + header.p_vaddr) / page * page;
        let end = (object.dlpi_addr + header.p_vaddr + header.p_memsz).next_multiple_of(page);
        let (Ok(address), Ok(length)) = (usize::try_from(start), usize::try_from(end - start))
        else {
            continue;
        };
        // SAFETY: the range is a segment of the program that is mapped from its file and was never
        // written to: whoever reads or runs it next gets the same bytes from the file again. What
        // relocations have written to stands in segments that were writable, which are left alone.
        unsafe {
            libc::madvise(ptr::with_exposed_provenance_mut(address), length, libc::MADV_DONTNEED);
        }
    }
    1
}

#[cfg(test)]
mod tests {
    #[test]
    fn the_program_runs_on() {
        let resident = || {
            let status = std::fs::read_to_string("/proc/self/status").unwrap();
            let line = status.lines().find_map(|line| line.strip_prefix("RssFile:")).unwrap();
            line.split_whitespace().next().unwrap().parse::<u64>().unwrap()
        };
        let before = resident();
        super::give_back();
        assert!(resident() < before);
        assert_eq!("a b".split(' ').map(str::len).sum::<usize>(), 2);
    }
}
