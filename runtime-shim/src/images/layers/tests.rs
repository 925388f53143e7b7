use std::{
    ffi::CStr,
    fs,
    io::Write,
    os::unix::fs::{FileTypeExt, MetadataExt, symlink},
};

use super::*;

/// One entry of an archive, with whatever an attacker may put in it.
struct Entry<'a> {
    name: &'a str,
    kind: EntryType,
    link: &'a str,
    content: &'a [u8],
    mode: u32,
    owner: (u64, u64),
    mtime: u64,
    records: &'a [(&'a str, &'a [u8])],
}

const FILE: Entry<'_> = Entry {
    name: "",
    kind: EntryType::Regular,
    link: "",
    content: b"",
    mode: 0o644,
    owner: (0, 0),
    mtime: 1_000_000_000,
    records: &[],
};

fn file(name: &str) -> Entry<'_> {
    Entry { name, content: b"content", ..FILE }
}

fn folder(name: &str) -> Entry<'_> {
    Entry { name, kind: EntryType::Directory, mode: 0o755, ..FILE }
}

fn link<'a>(kind: EntryType, name: &'a str, link: &'a str) -> Entry<'a> {
    Entry { name, kind, link, ..FILE }
}

fn archive(entries: &[Entry<'_>]) -> Vec<u8> {
    let mut builder = tar::Builder::new(Vec::new());
    for entry in entries {
        if !entry.records.is_empty() {
            builder.append_pax_extensions(entry.records.iter().copied()).unwrap();
        }
        let mut header = tar::Header::new_ustar();
        let ustar = header.as_ustar_mut().unwrap();
        // Not by the builder's own functions, which refuse what has to be tried here.
        ustar.name[..entry.name.len()].copy_from_slice(entry.name.as_bytes());
        ustar.linkname[..entry.link.len()].copy_from_slice(entry.link.as_bytes());
        header.set_entry_type(entry.kind);
        header.set_size(entry.content.len() as u64);
        header.set_mode(entry.mode);
        header.set_uid(entry.owner.0);
        header.set_gid(entry.owner.1);
        header.set_mtime(entry.mtime);
        if matches!(entry.kind, EntryType::Char | EntryType::Block) {
            header.set_device_major(1).unwrap();
            header.set_device_minor(3).unwrap();
        }
        header.set_cksum();
        builder.append(&header, entry.content).unwrap();
    }
    builder.into_inner().unwrap()
}

/// A folder to unpack into, with one beside it that must stay as it is.
struct Place {
    _all: tempfile::TempDir,
    layer: PathBuf,
    outside: PathBuf,
}

impl Place {
    fn new() -> Self {
        let all = tempfile::tempdir().unwrap();
        let (layer, outside) = (all.path().join("layer"), all.path().join("outside"));
        fs::create_dir(&layer).unwrap();
        fs::create_dir(&outside).unwrap();
        fs::write(outside.join("secret"), "secret").unwrap();
        Self { _all: all, layer, outside }
    }

    fn unpack(&self, tar: &[u8]) -> Result<Unpacked, LayerError> {
        let budget = Budget::new(64 << 20, 1000);
        unpack(blob(tar.to_vec(), &hashing::digest(tar)), &self.layer, &budget)
    }

    fn untouched(&self) -> bool {
        let names = fs::read_dir(&self.outside).unwrap().count();
        let secret = self.outside.join("secret");
        let links = fs::metadata(&secret).unwrap().nlink();
        fs::read(secret).unwrap() == b"secret" && (names, links) == (1, 1)
    }

    fn at(&self, path: &str) -> PathBuf {
        self.layer.join(path)
    }
}

fn blob(bytes: Vec<u8>, diff_id: &Digest) -> LayerBlob {
    LayerBlob { reader: Box::new(io::Cursor::new(bytes)), digest: None, diff_id: diff_id.clone() }
}

fn xattr(path: &Path, name: &CStr) -> Option<Vec<u8>> {
    let path = CString::new(path.as_os_str().as_bytes()).unwrap();
    let mut value = vec![0u8; 256];
    // SAFETY: both strings are terminated and the buffer has the length that is given.
    let length = unsafe {
        libc::lgetxattr(path.as_ptr(), name.as_ptr(), value.as_mut_ptr().cast(), value.len())
    };
    value.truncate(usize::try_from(length).ok()?);
    Some(value)
}

#[test]
fn what_a_layer_says_is_what_is_on_the_disk() {
    // cap_net_bind_service=ep, as the kernel stores it (version 2).
    let capability: &[u8] = b"\x01\0\0\x02\0\x04\0\0\0\0\0\0\0\0\0\0\0\0\0\0";
    let tar = archive(&[
        folder("./"),
        Entry { mode: 0o1777, mtime: 5, ..folder("tmp/") },
        Entry { owner: (1000, 2000), mode: 0o4755, ..file("usr/bin/tool") },
        Entry { records: &[("SCHILY.xattr.security.capability", capability)], ..file("bin/web") },
        Entry {
            records: &[
                ("mtime", b"1500000000.25"),
                ("SCHILY.xattr.trusted.overlay.redirect", b"/etc"),
            ],
            ..file("tmp/old")
        },
        link(EntryType::Symlink, "lib", "usr/lib"),
        link(EntryType::Link, "bin/same", "usr/bin/tool"),
        Entry { kind: EntryType::Fifo, mode: 0o622, ..FILE }.named("dev/pipe"),
        Entry { kind: EntryType::Char, mode: 0o666, ..FILE }.named("dev/null"),
        file("empty-parents/a/b/c"),
    ]);
    let place = Place::new();
    let unpacked = place.unpack(&tar).unwrap();
    assert_eq!((unpacked.entries, unpacked.bytes), (10, 4 * 7));

    let tool = fs::metadata(place.at("usr/bin/tool")).unwrap();
    assert_eq!((tool.uid(), tool.gid(), tool.mode() & 0o7777), (1000, 2000, 0o4755));
    assert_eq!(tool.mtime(), 1_000_000_000);
    assert_eq!(tool.ino(), fs::metadata(place.at("bin/same")).unwrap().ino());
    let web = place.at("bin/web");
    assert_eq!(xattr(&web, c"security.capability").as_deref(), Some(capability));
    let old = fs::metadata(place.at("tmp/old")).unwrap();
    assert_eq!((old.mtime(), old.mtime_nsec()), (1_500_000_000, 250_000_000));
    assert_eq!(xattr(&place.at("tmp/old"), c"trusted.overlay.redirect"), None);
    let tmp = fs::metadata(place.at("tmp")).unwrap();
    assert_eq!((tmp.mode() & 0o7777, tmp.mtime()), (0o1777, 5));
    assert_eq!(fs::read_link(place.at("lib")).unwrap(), Path::new("usr/lib"));
    let null = fs::metadata(place.at("dev/null")).unwrap();
    assert!(null.file_type().is_char_device());
    assert_eq!((null.rdev(), null.mode() & 0o777), (nix::sys::stat::makedev(1, 3), 0o666));
    assert!(fs::metadata(place.at("dev/pipe")).unwrap().file_type().is_fifo());
    assert_eq!(fs::metadata(place.at("empty-parents/a")).unwrap().mode() & 0o7777, 0o755);
}

impl<'a> Entry<'a> {
    fn named(self, name: &'a str) -> Self {
        Self { name, ..self }
    }
}

#[test]
fn whiteouts_are_overlays_own() {
    let tar = archive(&[
        file("kept/.wh.gone"),
        folder("opaque"),
        file("opaque/new"),
        file("opaque/.wh..wh..opq"),
        file(".wh..wh.plnk"),
        // Removed and made again in one layer: what is below stays hidden, the new one stays.
        file(".wh.again"),
        file("again"),
        file(".wh.folder"),
        folder("folder"),
        folder("late"),
        file(".wh.late"),
        file("there"),
        file(".wh.there"),
    ]);
    let place = Place::new();
    place.unpack(&tar).unwrap();
    let gone = fs::symlink_metadata(place.at("kept/gone")).unwrap();
    assert!(gone.file_type().is_char_device() && gone.rdev() == 0);
    for opaque in ["opaque", "folder", "late"] {
        let marked = xattr(&place.at(opaque), c"trusted.overlay.opaque");
        assert_eq!(marked.as_deref(), Some(b"y".as_slice()), "{opaque}");
    }
    assert_eq!(fs::read(place.at("again")).unwrap(), b"content");
    assert_eq!(fs::read(place.at("there")).unwrap(), b"content");
    assert!(!place.at(".wh..wh.plnk").exists() && !place.at("opaque/.wh..wh..opq").exists());
}

#[test]
fn no_archive_writes_outside() {
    let up = "../outside/secret";
    let refused: &[(&str, Vec<Entry<'_>>)] = &[
        ("a path up", vec![file(up)]),
        ("a path up in the middle", vec![file("a/../../outside/new")]),
        ("a hard link up", vec![link(EntryType::Link, "steal", up)]),
        ("a hard link from outside", vec![link(EntryType::Link, "steal", "/etc/passwd")]),
        (
            "a hard link through a link",
            vec![
                link(EntryType::Symlink, "out", "../outside"),
                link(EntryType::Link, "steal", "out/secret"),
            ],
        ),
        ("a hard link to a folder", vec![folder("a"), link(EntryType::Link, "b", "a")]),
        ("a whiteout up", vec![file("../outside/.wh.secret")]),
        ("a whiteout of a dot", vec![file(".wh...")]),
        ("a whiteout of nothing", vec![file(".wh.")]),
        ("a file as parent", vec![file("a"), file("a/b")]),
        ("a link loop as parent", vec![link(EntryType::Symlink, "a", "a"), file("a/b")]),
        ("an unknown kind", vec![Entry { kind: EntryType::new(b'V'), ..file("volume") }]),
        ("a link to nothing", vec![link(EntryType::Symlink, "a", "")]),
    ];
    for (what, entries) in refused {
        let place = Place::new();
        let outcome = place.unpack(&archive(entries));
        assert!(matches!(outcome, Err(LayerError::Refused { .. })), "{what}: {outcome:?}");
        assert!(place.untouched(), "{what}");
    }
}

#[test]
fn links_that_leave_end_in_the_layers_own_root() {
    let place = Place::new();
    let absolute = place.outside.to_str().unwrap().to_owned();
    let tar = archive(&[
        file("/rooted"),
        link(EntryType::Symlink, "up", "../../../../../.."),
        file("up/from-up"),
        link(EntryType::Symlink, "away", &absolute),
        // As a container would find it: the target is below its own root, and is not there.
        file("again"),
    ]);
    place.unpack(&tar).unwrap();
    assert!(place.at("rooted").exists() && place.at("from-up").exists());
    // A file written over a planted link replaces the link.
    let place = Place::new();
    symlink(place.outside.join("secret"), place.at("planted")).unwrap();
    place.unpack(&archive(&[file("planted")])).unwrap();
    assert!(place.untouched());
    assert!(fs::symlink_metadata(place.at("planted")).unwrap().is_file());
}

#[test]
fn a_later_entry_replaces_an_earlier_one() {
    let place = Place::new();
    let tar = archive(&[
        folder("a"),
        folder("a/b"),
        file("a/b/c"),
        file("a"),
        link(EntryType::Symlink, "d", "a"),
        folder("d"),
        Entry { mode: 0o700, ..folder("d") },
        file("d/e"),
    ]);
    place.unpack(&tar).unwrap();
    assert!(fs::symlink_metadata(place.at("a")).unwrap().is_file());
    let d = fs::symlink_metadata(place.at("d")).unwrap();
    assert!(d.is_dir() && d.mode() & 0o777 == 0o700 && place.at("d/e").exists());
}

#[test]
fn every_compression_is_told_by_its_content_and_verified() {
    let tar = archive(&[file("a")]);
    let mut gzip = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    gzip.write_all(&tar).unwrap();
    let zstd = zstd::encode_all(tar.as_slice(), 1).unwrap();
    for bytes in [tar.clone(), gzip.finish().unwrap(), zstd] {
        let diff_id = hashing::digest(&tar);
        let wrong = hashing::digest(b"another");
        for (digest, diff, right) in [
            (hashing::digest(&bytes), &diff_id, true),
            (wrong.clone(), &diff_id, false),
            (hashing::digest(&bytes), &wrong, false),
        ] {
            let place = Place::new();
            let blob = LayerBlob { digest: Some(digest), ..blob(bytes.clone(), diff) };
            match unpack(blob, &place.layer, &Budget::new(1 << 20, 10)) {
                Ok(_) => assert!(right && place.at("a").exists()),
                Err(LayerError::DigestMismatch { .. }) => assert!(!right),
                Err(error) => panic!("{error}"),
            }
        }
        let cut = bytes[..bytes.len() / 2].to_vec();
        let place = Place::new();
        assert!(unpack(blob(cut, &diff_id), &place.layer, &Budget::new(1 << 20, 10)).is_err());
    }
    let place = Place::new();
    assert!(place.unpack(b"BZh91AY&SY").is_err());
    assert!(place.unpack(b"\x1f\x8bnot really").is_err());
}

#[test]
fn a_bomb_is_refused_before_it_fills_the_disk() {
    let zeros = vec![0; 8 << 20];
    let tar = archive(&[Entry { content: &zeros, ..file("zeros") }]);
    let bomb = zstd::encode_all(tar.as_slice(), 1).unwrap();
    assert!(bomb.len() < 4096);
    let place = Place::new();
    let outcome =
        unpack(blob(bomb.clone(), &hashing::digest(&tar)), &place.layer, &Budget::new(1 << 20, 10));
    let said = outcome.unwrap_err().to_string();
    assert!(said.contains("more bytes than is allowed"), "{said}");

    // And where it is allowed, what is only zeros takes no space.
    let place = Place::new();
    let budget = Budget::new(16 << 20, 10);
    let unpacked = unpack(blob(bomb, &hashing::digest(&tar)), &place.layer, &budget).unwrap();
    let zeros = fs::metadata(place.at("zeros")).unwrap();
    assert_eq!((unpacked.bytes, zeros.len()), (0, 8 << 20));
    assert!(zeros.blocks() < 16);

    let many: Vec<String> = (0..20).map(|n| n.to_string()).collect();
    let tar = archive(&many.iter().map(|name| file(name)).collect::<Vec<_>>());
    let place = Place::new();
    let outcome =
        unpack(blob(tar.clone(), &hashing::digest(&tar)), &place.layer, &Budget::new(1 << 20, 10));
    assert!(outcome.unwrap_err().to_string().contains("more files than is allowed"));
}

#[test]
fn times_have_fractions_and_may_be_before_the_epoch() {
    for (text, expected) in [
        ("0", Some((0, 0))),
        ("12.5", Some((12, 500_000_000))),
        ("12.123456789999", Some((12, 123_456_789))),
        ("-1.25", Some((-2, 750_000_000))),
        ("x", None),
        ("1.x", None),
    ] {
        let parsed = parse_time(text).map(|t| (t.tv_sec(), t.tv_nsec()));
        assert_eq!(parsed, expected, "{text}");
    }
}

proptest::proptest! {
    #![proptest_config(proptest::prelude::ProptestConfig::with_cases(64))]
    #[test]
    fn no_sequence_of_entries_leaves_the_layer(
        entries in proptest::collection::vec(
            (0usize..6, "(\\.\\./|/|[ab]/){0,3}(a|b|\\.wh\\.a|\\.\\.)", "(\\.\\./|/|[ab]/){0,4}(a|b|outside/secret)"),
            1..12,
        ),
    ) {
        let place = Place::new();
        let kinds = [
            EntryType::Regular, EntryType::Directory, EntryType::Symlink, EntryType::Symlink,
            EntryType::Link, EntryType::Fifo,
        ];
        let entries: Vec<Entry<'_>> = entries
            .iter()
            .map(|(kind, name, target)| match kinds[*kind] {
                kind @ (EntryType::Symlink | EntryType::Link) => link(kind, name, target),
                kind => Entry { kind, ..FILE }.named(name),
            })
            .collect();
        let _ = place.unpack(&archive(&entries));
        proptest::prop_assert!(place.untouched());
    }
}
