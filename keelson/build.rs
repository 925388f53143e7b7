//! Has the linker put the functions that a running node uses side by side.
//!
//! A node that is up runs a few megabytes of the program's thirty, scattered over all of it; as the
//! kernel maps a file in pieces of many pages, nearly all of it would be resident.
//! `function-order.gz` names those functions (`tools/function-order` makes it, by watching the
//! program run), and LLD, which `rustc` uses for this target, places them first. Names that a build
//! doesn't have are passed over: a stale list costs memory and nothing else.

use std::{env, error::Error, fs::File, io, path::Path};

use flate2::read::GzDecoder;

const LIST: &str = "function-order.gz";
/// Set to anything, the linker is asked for nothing: for linkers other than LLD.
const OFF: &str = "KEELSON_NO_FUNCTION_ORDER";
/// Where `rustc` brings LLD along and uses it.
const TARGET: &str = "x86_64-unknown-linux-gnu";

fn main() -> Result<(), Box<dyn Error>> {
    println!("cargo::rerun-if-changed={LIST}");
    println!("cargo::rerun-if-env-changed={OFF}");
    let wanted = env::var("TARGET")? == TARGET && env::var("PROFILE")? == "release";
    if !wanted || env::var_os(OFF).is_some() {
        return Ok(());
    }
    let list = Path::new(&env::var("OUT_DIR")?).join("function-order");
    io::copy(&mut GzDecoder::new(File::open(LIST)?), &mut File::create(&list)?)?;
    println!("cargo::rustc-link-arg-bins=-Wl,--symbol-ordering-file={}", list.display());
    println!("cargo::rustc-link-arg-bins=-Wl,--no-warn-symbol-ordering");
    Ok(())
}
