//! What a URL asks for (the rules of `apiserver/pkg/endpoints/request`).

use http::Method;

use crate::status::Status;

/// The parameters of a URL's query, decoded, in order.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Query(Vec<(String, String)>);

impl Query {
    pub(crate) fn parse(query: Option<&str>) -> Self {
        let pairs = query.unwrap_or_default().split('&').filter(|pair| !pair.is_empty());
        Self(
            pairs
                .map(|pair| {
                    let (name, value) = pair.split_once('=').unwrap_or((pair, ""));
                    (percent_decode(name, true), percent_decode(value, true))
                })
                .collect(),
        )
    }

    /// The first value of a parameter that is not empty.
    pub(crate) fn get(&self, name: &str) -> Option<&str> {
        self.all(name).find(|value| !value.is_empty())
    }

    pub(crate) fn all(&self, name: &str) -> impl Iterator<Item = &str> {
        self.0.iter().filter(move |(key, _)| key == name).map(|(_, value)| value.as_str())
    }

    pub(crate) fn has(&self, name: &str) -> bool {
        self.0.iter().any(|(key, _)| key == name)
    }

    /// Whether a parameter is there and not `false` or `0`: how Kubernetes reads booleans in URLs.
    pub(crate) fn flag(&self, name: &str) -> bool {
        self.0
            .iter()
            .find(|(key, _)| key == name)
            .is_some_and(|(_, value)| !matches!(value.as_str(), "false" | "0"))
    }

    /// A number.
    pub(crate) fn number(&self, name: &str) -> Result<Option<i64>, Status> {
        self.get(name)
            .map(|text| {
                text.parse().map_err(|_| {
                    Status::bad_request(format!("the parameter {name}={text} is not a number"))
                })
            })
            .transpose()
    }
}

/// Undoes percent-encoding; in queries a plus is a space. What is not valid stays as it is.
pub(crate) fn percent_decode(text: &str, plus: bool) -> String {
    let bytes = text.as_bytes();
    let mut decoded = Vec::with_capacity(bytes.len());
    let mut at = 0;
    while at < bytes.len() {
        let hex = (bytes[at] == b'%')
            .then(|| bytes.get(at + 1..at + 3))
            .flatten()
            .filter(|hex| hex.iter().all(u8::is_ascii_hexdigit))
            .and_then(|hex| std::str::from_utf8(hex).ok())
            .and_then(|hex| u8::from_str_radix(hex, 16).ok());
        match hex {
            Some(byte) => {
                decoded.push(byte);
                at += 3;
            }
            None => {
                decoded.push(if plus && bytes[at] == b'+' { b' ' } else { bytes[at] });
                at += 1;
            }
        }
    }
    String::from_utf8_lossy(&decoded).into_owned()
}

/// What a request is for.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct RequestInfo {
    /// `get`, `list`, …; for paths that are no resource the method in lower case.
    pub(crate) verb: &'static str,
    /// Whether it names a resource.
    pub(crate) resource_request: bool,
    pub(crate) group: String,
    pub(crate) version: String,
    pub(crate) namespace: String,
    /// Plural name.
    pub(crate) resource: String,
    pub(crate) subresource: String,
    pub(crate) name: String,
    /// What follows a `proxy` subresource, as it was sent and without its first slash.
    pub(crate) rest: String,
    /// The URL's path.
    pub(crate) path: String,
    pub(crate) query: Query,
    /// As it was sent.
    pub(crate) raw_query: Option<String>,
}

impl RequestInfo {
    pub(crate) fn of(method: &Method, path: &str, query: Option<&str>) -> Self {
        let raw_query = query.map(str::to_owned);
        let query = Query::parse(query);
        let mut info = Self {
            verb: method_name(method),
            path: path.to_owned(),
            query,
            raw_query,
            ..Self::default()
        };
        let parts: Vec<&str> = path.split('/').filter(|part| !part.is_empty()).collect();
        let (group, version, rest) = match parts.as_slice() {
            ["api", version, rest @ ..] => ("", *version, rest),
            ["apis", group, version, rest @ ..] => (*group, *version, rest),
            _ => return info,
        };
        if rest.is_empty() {
            return info;
        }
        info.group = group.to_owned();
        info.version = version.to_owned();
        info.resource_request = true;
        info.verb = match *method {
            Method::POST => "create",
            Method::GET | Method::HEAD => "get",
            Method::PUT => "update",
            Method::PATCH => "patch",
            Method::DELETE => "delete",
            _ => "",
        };
        info.parse_resource(rest);
        info
    }

    fn parse_resource(&mut self, mut parts: &[&str]) {
        // The deprecated form `/api/v1/watch/namespaces/...`.
        let mut watch = false;
        if let ["watch", rest @ ..] = parts
            && self.verb == "get"
            && !rest.is_empty()
        {
            watch = true;
            parts = rest;
        }
        if let ["namespaces", namespace, rest @ ..] = parts {
            self.namespace = percent_decode(namespace, false);
            // What belongs to the namespace itself is no resource in it.
            if !rest.is_empty() && !matches!(rest[0], "status" | "finalize") {
                parts = rest;
            }
        }
        let part = |n: usize| parts.get(n).map(|part| percent_decode(part, false));
        self.resource = part(0).unwrap_or_default();
        self.name = part(1).unwrap_or_default();
        self.subresource = part(2).unwrap_or_default();
        if self.resource == "namespaces" {
            self.namespace.clone_from(&self.name);
        }
        if self.subresource == "proxy" {
            // With its slashes as they were.
            let behind = self.path.match_indices("/proxy").map(|(at, found)| at + found.len());
            let behind =
                behind.map(|at| &self.path[at..]).find(|t| t.is_empty() || t.starts_with('/'));
            self.rest = behind.unwrap_or_default().trim_start_matches('/').to_owned();
        } else if parts.len() > 3 {
            // Nothing is that deep.
            self.subresource = parts[2..].join("/");
        }
        let watching = watch || self.query.flag("watch");
        match self.verb {
            "get" if watch => self.verb = "watch",
            "get" if self.name.is_empty() => self.verb = if watching { "watch" } else { "list" },
            "delete" if self.name.is_empty() => self.verb = "deletecollection",
            _ => {}
        }
    }

    /// Whether the request may stay open for as long as the client likes.
    pub(crate) fn is_long_running(&self) -> bool {
        self.resource_request
            && (self.verb == "watch"
                || matches!(
                    self.subresource.as_str(),
                    "log" | "exec" | "attach" | "portforward" | "proxy"
                ))
    }

    pub(crate) fn is_mutating(&self) -> bool {
        !matches!(self.verb, "get" | "list" | "watch" | "head" | "options")
    }

    /// `cluster`, `namespace` or `resource`, as metrics label it.
    pub(crate) fn scope(&self) -> &'static str {
        if !self.resource_request {
            ""
        } else if !self.name.is_empty() {
            "resource"
        } else if !self.namespace.is_empty() {
            "namespace"
        } else {
            "cluster"
        }
    }
}

fn method_name(method: &Method) -> &'static str {
    match *method {
        Method::GET => "get",
        Method::HEAD => "head",
        Method::POST => "post",
        Method::PUT => "put",
        Method::PATCH => "patch",
        Method::DELETE => "delete",
        Method::OPTIONS => "options",
        _ => "",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(method: Method, url: &str) -> RequestInfo {
        let (path, query) = url.split_once('?').map_or((url, None), |(p, q)| (p, Some(q)));
        RequestInfo::of(&method, path, query)
    }

    #[test]
    fn urls_say_what_is_asked_for() {
        type Row<'a> = (Method, &'a str, &'a str, &'a str, &'a str, &'a str, &'a str);
        // method, URL, verb, namespace, resource, name, subresource
        let table: &[Row<'_>] = &[
            (Method::GET, "/api/v1/pods", "list", "", "pods", "", ""),
            (Method::GET, "/api/v1/pods?watch=true", "watch", "", "pods", "", ""),
            (Method::GET, "/api/v1/pods?watch=0", "list", "", "pods", "", ""),
            (Method::GET, "/api/v1/watch/pods", "watch", "", "pods", "", ""),
            (Method::GET, "/api/v1/watch/namespaces/d/pods/x", "watch", "d", "pods", "x", ""),
            (Method::GET, "/api/v1/namespaces/d/pods/x", "get", "d", "pods", "x", ""),
            (
                Method::PUT,
                "/api/v1/namespaces/d/pods/x/status",
                "update",
                "d",
                "pods",
                "x",
                "status",
            ),
            (
                Method::POST,
                "/apis/apps/v1/namespaces/d/deployments",
                "create",
                "d",
                "deployments",
                "",
                "",
            ),
            (
                Method::DELETE,
                "/apis/apps/v1/namespaces/d/deployments",
                "deletecollection",
                "d",
                "deployments",
                "",
                "",
            ),
            (Method::GET, "/api/v1/namespaces", "list", "", "namespaces", "", ""),
            (Method::GET, "/api/v1/namespaces/d", "get", "d", "namespaces", "d", ""),
            (
                Method::PUT,
                "/api/v1/namespaces/d/finalize",
                "update",
                "d",
                "namespaces",
                "d",
                "finalize",
            ),
            (
                Method::PATCH,
                "/api/v1/namespaces/d/status",
                "patch",
                "d",
                "namespaces",
                "d",
                "status",
            ),
            (Method::GET, "/api/v1/nodes/n/proxy/metrics", "get", "", "nodes", "n", "proxy"),
        ];
        for (method, url, verb, namespace, resource, name, subresource) in table {
            let info = of(method.clone(), url);
            assert!(info.resource_request, "{url}");
            assert_eq!(
                (info.verb, &*info.namespace, &*info.resource, &*info.name, &*info.subresource),
                (*verb, *namespace, *resource, *name, *subresource),
                "{method} {url}"
            );
        }
        for url in ["/api", "/apis", "/apis/apps", "/apis/apps/v1", "/api/v1", "/healthz", "/"] {
            assert!(!of(Method::GET, url).resource_request, "{url}");
        }
        assert_eq!(of(Method::GET, "/api/v1/nodes/n/proxy/a//b%20c").rest, "a//b%20c");
        assert_eq!(of(Method::GET, "/api/v1/nodes/n/proxy").rest, "");
    }

    #[test]
    fn queries_are_decoded() {
        let query = Query::parse(Some("a=1&labelSelector=app%3Dx+y&f&command=a&command=b%2"));
        assert_eq!(query.get("labelSelector"), Some("app=x y"));
        assert!(query.flag("f") && !query.flag("g"));
        assert_eq!(query.all("command").collect::<Vec<_>>(), ["a", "b%2"]);
        assert_eq!(query.number("a").unwrap(), Some(1));
        assert!(query.number("labelSelector").is_err());
    }
}
