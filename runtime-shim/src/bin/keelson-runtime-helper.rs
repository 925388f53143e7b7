//! The runtime's helper as a program of its own: what `keelson runtime-helper` is in the main
//! binary. The crate's tests use it.

fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    std::process::exit(keelson_runtime_shim::embedded::helper_main(&arguments));
}
