//! What to say of an error of the client.

/// The API server's own sentence where there is one: the client's text repeats it among what only a
/// programmer reads.
pub fn shown(error: &kube::Error) -> String {
    match error {
        kube::Error::Api(status) if !status.message.is_empty() => status.message.clone(),
        other => other.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_refusal_is_shown_in_the_servers_words() {
        let status: kube::core::Status = serde_json::from_value(serde_json::json!({
            "status": "Failure", "code": 404, "reason": "NotFound", "message": "pods \"a\" not found",
        }))
        .unwrap();
        assert_eq!(shown(&kube::Error::Api(status.boxed())), "pods \"a\" not found");
    }
}
