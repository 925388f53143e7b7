//! Whatever the kernel answers, its answers are read to an end.

#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| keelson_proxy::fuzzing::netlink_answers(data));
