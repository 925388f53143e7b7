//! Builds the shim as a program of its own, static and small, so that the crate can carry it.
//!
//! It has to be another program than the one that carries it: a re-executed large binary costs
//! every pod more private memory, in relocations alone, than the shim needs in all. Cargo can't yet
//! make one crate's binary a dependency of another on the stable toolchain, so a cargo within cargo
//! does it, with a target folder of its own (the outer one is locked) and the same lock file.

use std::{
    env,
    path::PathBuf,
    process::{Command, exit},
};

fn main() {
    let manifest_dir = PathBuf::from(required("CARGO_MANIFEST_DIR"));
    let out_dir = PathBuf::from(required("OUT_DIR"));
    let target = required("TARGET");
    let shim = manifest_dir.join("shim");
    for watched in ["shim/src", "shim/Cargo.toml", "build.rs"] {
        println!("cargo::rerun-if-changed={watched}");
    }

    let target_dir = out_dir.join("shim");
    let mut cargo = Command::new(env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    // Flags, wrappers and features meant for the outer build must not reach the inner one.
    for (name, _) in env::vars_os() {
        let inherited = name.to_string_lossy();
        let kept = ["CARGO_HOME", "CARGO_NET_OFFLINE", "CARGO_HTTP_CAINFO"];
        if (inherited.starts_with("CARGO") && !kept.contains(&&*inherited))
            || inherited.starts_with("RUSTC")
            || ["RUSTFLAGS", "RUSTDOCFLAGS", "MAKEFLAGS", "TARGET", "HOST", "OUT_DIR", "PROFILE"]
                .contains(&&*inherited)
        {
            cargo.env_remove(&name);
        }
    }
    let status = cargo
        .current_dir(&shim)
        .args(["build", "--release", "--bin", "keelson-shim", "--target", &target])
        .arg("--target-dir")
        .arg(&target_dir)
        .env("RUSTFLAGS", "-C target-feature=+crt-static -C relocation-model=static")
        .env("CARGO_PROFILE_RELEASE_PANIC", "abort")
        .env("CARGO_PROFILE_RELEASE_OPT_LEVEL", "s")
        .env("CARGO_PROFILE_RELEASE_LTO", "fat")
        .env("CARGO_PROFILE_RELEASE_CODEGEN_UNITS", "1")
        .env("CARGO_PROFILE_RELEASE_STRIP", "symbols")
        .status();
    match status {
        Ok(status) if status.success() => {}
        Ok(status) => {
            fail(&format!("building the shim in {}: cargo ended with {status}", shim.display()))
        }
        Err(error) => fail(&format!("building the shim in {}: {error}", shim.display())),
    }
    let program = target_dir.join(&target).join("release").join("keelson-shim");
    println!("cargo::rustc-env=KEELSON_SHIM_PROGRAM={}", program.display());
}

fn required(name: &str) -> String {
    env::var(name).unwrap_or_else(|_| fail(&format!("cargo did not set {name}")))
}

fn fail(message: &str) -> ! {
    println!("cargo::error={message}");
    exit(1)
}
