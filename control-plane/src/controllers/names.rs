//! Names and hashes of objects that controllers make.

use k8s_openapi::api::core::v1::PodTemplateSpec;
use sha2::{Digest, Sha256};

/// Letters and digits that make no words and no mistakes; Kubernetes' generated names use the same.
const ALPHABET: &[u8] = b"bcdfghjklmnpqrstvwxz2456789";
/// How long a generated name's fixed part may be: 63 less the five random letters.
const LONGEST_PREFIX: usize = 58;

/// The name's fixed part, as `metadata.generateName` has it.
pub(crate) fn prefix(owner: &str) -> String {
    let mut prefix = format!("{owner}-");
    // Names are ASCII; a boundary in the middle of a letter can't be.
    prefix.truncate(LONGEST_PREFIX);
    prefix
}

/// A name with five random letters after the prefix.
pub(crate) fn random(prefix: &str) -> String {
    let suffix = (0..5).map(|_| ALPHABET[rand::random_range(0..ALPHABET.len())] as char);
    prefix.chars().chain(suffix).collect()
}

/// A stable short hash of a pod template: the same template has the same hash in every version of
/// this program that knows the same fields. `collisions` makes another one when a name is taken.
pub(crate) fn template_hash(template: &PodTemplateSpec, collisions: i32) -> String {
    let mut hasher = Sha256::new();
    // Maps in it are ordered, so equal templates have equal texts.
    hasher.update(serde_json::to_vec(template).unwrap_or_default());
    hasher.update(collisions.to_be_bytes());
    hasher
        .finalize()
        .iter()
        .take(10)
        .map(|byte| ALPHABET[usize::from(*byte) % ALPHABET.len()] as char)
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn generated_names_are_bounded() {
        assert_eq!(prefix("web"), "web-");
        assert_eq!(prefix(&"x".repeat(80)).len(), 58);
        assert_eq!(random("web-").len(), 9);
    }

    #[test]
    fn a_hash_is_stable_and_differs_by_collision() {
        let template = PodTemplateSpec::default();
        assert_eq!(template_hash(&template, 0), template_hash(&template, 0));
        assert_ne!(template_hash(&template, 0), template_hash(&template, 1));
        assert_eq!(template_hash(&template, 0).len(), 10);
    }
}
