//! Whatever Services and EndpointSlices there are, kernel and programs take the rules. Needs root.

#![no_main]

use keelson_proxy::fuzzing;
use libfuzzer_sys::fuzz_target;

fuzz_target!(
    init: fuzzing::enter_network_of_its_own().expect("root may have a network namespace"),
    |data: &[u8]| fuzzing::objects_to_rules(data)
);
