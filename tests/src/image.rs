//! Images made of what the machine has.

use std::{fs::File, path::Path, process::Command};

use serde_json::json;

/// Writes a `docker save` archive with busybox as `/bin/busybox`, links for all its programs, and
/// users and a temporary folder.
///
/// # Panics
/// When busybox-static, sha256sum or tar is missing, or the file can't be written.
pub fn write_busybox_archive(path: &Path, name: &str) {
    let dir = tempfile::tempdir().expect("a folder");
    let (root, image) = (dir.path().join("root"), dir.path().join("image"));
    for folder in ["bin", "tmp", "etc", "root", "var", "dev", "proc", "sys"] {
        std::fs::create_dir_all(root.join(folder)).expect("folder");
    }
    std::fs::create_dir_all(&image).expect("folder");
    std::fs::copy("/bin/busybox", root.join("bin/busybox")).expect("busybox-static");
    let list = Command::new("/bin/busybox").arg("--list").output().expect("busybox-static");
    for program in String::from_utf8_lossy(&list.stdout).lines().filter(|p| *p != "busybox") {
        std::os::unix::fs::symlink("busybox", root.join("bin").join(program)).expect("link");
    }
    // A statically linked busybox crashes when it looks up names: the client is curl with its
    // libraries.
    copy_with_libraries(Path::new("/usr/bin/curl"), &root);
    std::fs::write(
        root.join("etc/passwd"),
        "root:x:0:0:root:/root:/bin/sh\napp:x:1000:1000::/:/bin/sh\n",
    )
    .expect("passwd");
    std::fs::write(root.join("etc/group"), "root:x:0:\napp:x:1000:\n").expect("group");

    let layer = image.join("layer.tar");
    run(Command::new("tar")
        .arg("-cf")
        .arg(&layer)
        .args(["--sort=name", "--mtime=@0", "-C"])
        .arg(&root)
        .arg("."));
    let sum = Command::new("sha256sum").arg(&layer).output().expect("sha256sum");
    let digest = String::from_utf8_lossy(&sum.stdout)[..64].to_owned();
    let config = json!({
        "architecture": architecture(), "os": "linux",
        "config": {"Env": ["PATH=/bin:/usr/bin"], "Cmd": ["/bin/sh"]},
        "rootfs": {"type": "layers", "diff_ids": [format!("sha256:{digest}")]},
        "history": [{"created": "1970-01-01T00:00:00Z"}]
    });
    std::fs::write(image.join("config.json"), config.to_string()).expect("config");
    let manifest = json!([{"Config": "config.json", "RepoTags": [name], "Layers": ["layer.tar"]}]);
    std::fs::write(image.join("manifest.json"), manifest.to_string()).expect("manifest");
    let archive = File::create(path).expect("the archive");
    run(Command::new("tar").args(["-cf", "-", "-C"]).arg(&image).arg(".").stdout(archive));
}

/// Copies a program of this machine, the libraries that it loads, and those that the C library loads
/// to look up names, to the same places below `root`.
fn copy_with_libraries(program: &Path, root: &Path) {
    let listed = Command::new("ldd").arg(program).output().expect("ldd");
    let listed = String::from_utf8_lossy(&listed.stdout).into_owned();
    let libraries: Vec<&str> =
        listed.split_whitespace().filter(|word| word.starts_with('/')).collect();
    let c_library = libraries.iter().find(|path| path.contains("/libc.so")).expect("libc");
    let folder = Path::new(c_library).parent().expect("a folder");
    let for_names = ["libnss_dns.so.2", "libnss_files.so.2", "libresolv.so.2"];
    let for_names = for_names.iter().map(|name| folder.join(name)).filter(|path| path.exists());
    let program = program.to_owned();
    for file in
        libraries.iter().map(|path| Path::new(path).to_owned()).chain(for_names).chain([program])
    {
        let to = root.join(file.strip_prefix("/").expect("absolute"));
        std::fs::create_dir_all(to.parent().expect("a folder")).expect("folder");
        std::fs::copy(&file, &to).unwrap_or_else(|error| panic!("{}: {error}", file.display()));
    }
}

fn architecture() -> &'static str {
    if cfg!(target_arch = "aarch64") { "arm64" } else { "amd64" }
}

fn run(command: &mut Command) {
    let status = command.status().expect("tar");
    assert!(status.success(), "{command:?}: {status}");
}
