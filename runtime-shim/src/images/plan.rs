//! The decisions of the image store, as pure functions.

use std::collections::BTreeSet;

use oci_spec::image::{Arch, Descriptor, ImageConfiguration, Os};

use super::{records::ImageRecord, reference::Digest};

/// The entry of a multi-platform index that fits this machine best: Linux, this architecture, and
/// among several variants of it the newest that the machine surely has.
pub(crate) fn choose_platform<'a>(
    manifests: &'a [Descriptor],
    arch: &Arch,
) -> Option<&'a Descriptor> {
    let fits = |descriptor: &&Descriptor| {
        descriptor
            .platform()
            .as_ref()
            .is_some_and(|p| *p.os() == Os::Linux && p.architecture() == arch)
    };
    // An arm64 machine is v8 by definition; of amd64 and arm only the plain variant is sure.
    let preference = |descriptor: &&Descriptor| match descriptor
        .platform()
        .as_ref()
        .and_then(|p| p.variant().as_deref())
    {
        None => 0,
        Some("v8") if *arch == Arch::ARM64 => 0,
        Some("v1") if *arch == Arch::Amd64 => 0,
        Some("v6") if *arch == Arch::ARM => 1,
        Some("v7") if *arch == Arch::ARM => 2,
        Some(_) => 3,
    };
    let chosen = manifests.iter().filter(fits).min_by_key(preference);
    // An index of one manifest that does not say its platform leaves no choice.
    chosen.or_else(|| match manifests {
        [only] if only.platform().is_none() => Some(only),
        _ => None,
    })
}

/// The layers to stack, bottom first. A layer that comes twice stays where it comes last: overlay
/// refuses the same folder twice, and the later one decides all that the earlier one did.
pub(crate) fn stacked(diff_ids: &[Digest]) -> Vec<Digest> {
    let mut seen = BTreeSet::new();
    let mut stack: Vec<Digest> =
        diff_ids.iter().rev().filter(|id| seen.insert(*id)).cloned().collect();
    stack.reverse();
    stack
}

/// The numeric user of a configuration's `User`, or its name.
pub(crate) fn configured_user(config: &ImageConfiguration) -> (Option<i64>, Option<String>) {
    let user = config.config().as_ref().and_then(|c| c.user().as_deref()).unwrap_or_default();
    let user = user.split(':').next().unwrap_or_default();
    match user.parse::<u32>() {
        Ok(uid) => (Some(uid.into()), None),
        Err(_) if user.is_empty() => (None, None),
        Err(_) => (None, Some(user.to_owned())),
    }
}

/// The layers of `present` that no image and no pull at work needs.
pub(crate) fn unused_layers(
    present: &[Digest],
    images: &[ImageRecord],
    leased: &BTreeSet<Digest>,
) -> Vec<Digest> {
    let used: BTreeSet<&str> =
        images.iter().flat_map(|image| image.layers.iter().map(String::as_str)).collect();
    present
        .iter()
        .filter(|layer| !used.contains(layer.as_str()) && !leased.contains(*layer))
        .cloned()
        .collect()
}

#[cfg(test)]
mod tests {
    use oci_spec::image::{ConfigBuilder, DescriptorBuilder, ImageConfigurationBuilder};
    use oci_spec::image::{MediaType, PlatformBuilder};

    use super::*;

    fn digest(n: u8) -> Digest {
        Digest::from_hex(&format!("{n:064x}")).unwrap()
    }

    fn entry(n: u8, platform: Option<(Os, Arch, Option<&str>)>) -> Descriptor {
        let mut builder = DescriptorBuilder::default()
            .media_type(MediaType::ImageManifest)
            .size(1u64)
            .digest(oci_spec::image::Digest::try_from(digest(n).as_str()).unwrap());
        if let Some((os, arch, variant)) = platform {
            let mut platform = PlatformBuilder::default().os(os).architecture(arch);
            if let Some(variant) = variant {
                platform = platform.variant(variant);
            }
            builder = builder.platform(platform.build().unwrap());
        }
        builder.build().unwrap()
    }

    #[test]
    fn the_platform_that_fits_is_chosen() {
        let unknown = || Some((Os::Other("unknown".into()), Arch::Other("unknown".into()), None));
        for (manifests, arch, chosen) in [
            (vec![], Arch::Amd64, None),
            (vec![entry(1, None)], Arch::Amd64, Some(1)),
            (vec![entry(1, None), entry(2, None)], Arch::Amd64, None),
            (
                vec![
                    entry(1, unknown()),
                    entry(2, Some((Os::Windows, Arch::Amd64, None))),
                    entry(3, Some((Os::Linux, Arch::ARM64, Some("v8")))),
                    entry(4, Some((Os::Linux, Arch::Amd64, Some("v3")))),
                    entry(5, Some((Os::Linux, Arch::Amd64, None))),
                ],
                Arch::Amd64,
                Some(5),
            ),
            (vec![entry(1, Some((Os::Linux, Arch::Amd64, None)))], Arch::ARM64, None),
            (
                vec![
                    entry(1, Some((Os::Linux, Arch::ARM64, Some("v9")))),
                    entry(2, Some((Os::Linux, Arch::ARM64, Some("v8")))),
                ],
                Arch::ARM64,
                Some(2),
            ),
        ] {
            let found = choose_platform(&manifests, &arch).map(|d| d.digest().to_string());
            assert_eq!(found, chosen.map(|n| digest(n).to_string()));
        }
    }

    #[test]
    fn a_repeated_layer_stays_where_it_is_last() {
        let ids = |ns: &[u8]| ns.iter().map(|n| digest(*n)).collect::<Vec<_>>();
        for (given, stack) in [
            (vec![], vec![]),
            (vec![1, 2, 3], vec![1, 2, 3]),
            (vec![1, 2, 1, 3], vec![2, 1, 3]),
            (vec![1, 1, 1], vec![1]),
        ] {
            assert_eq!(stacked(&ids(&given)), ids(&stack));
        }
    }

    #[test]
    fn users_are_numbers_or_names() {
        for (user, expected) in [
            ("", (None, None)),
            ("1000", (Some(1000), None)),
            ("1000:2000", (Some(1000), None)),
            ("nobody", (None, Some("nobody".to_owned()))),
            ("nobody:nogroup", (None, Some("nobody".to_owned()))),
        ] {
            let config = ConfigBuilder::default().user(user).build().unwrap();
            let config = ImageConfigurationBuilder::default().config(config).build().unwrap();
            assert_eq!(configured_user(&config), expected, "{user}");
        }
    }

    #[test]
    fn a_layer_that_somebody_needs_stays() {
        let record = ImageRecord { layers: vec![digest(1).to_string()], ..ImageRecord::default() };
        let present = [digest(1), digest(2), digest(3)];
        let unused = unused_layers(&present, &[record], &BTreeSet::from([digest(2)]));
        assert_eq!(unused, [digest(3)]);
    }
}
