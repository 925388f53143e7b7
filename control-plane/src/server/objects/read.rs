//! Get and list.

use std::sync::Arc;

use base64::{Engine as _, engine::general_purpose::URL_SAFE_NO_PAD};
use http::StatusCode;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::selection::Selection;
use crate::{
    cache,
    registry::Resource,
    server::{
        core::{Call, Core, store_status},
        negotiate::Shape,
        request::Query,
        respond::{self, Answer, ListMeta},
    },
    status::{FieldError, Status},
    store::{ListRange, Revision, StoreError},
};

/// Objects that are read from the store at a time when a list is of the past.
const HISTORY_PAGE: usize = 500;

/// Answers a get.
pub(crate) async fn get(
    core: &Core,
    call: &Call,
    resource: &Arc<Resource>,
) -> Result<Answer, Status> {
    let accepted = call.accept(&[Shape::Table, Shape::Partial])?;
    let include = call.include()?;
    let object = find(core, call, resource).await?;
    Ok(respond::object(StatusCode::OK, resource, &object, accepted, include))
}

/// The object that a request names, in the version it asked for.
pub(crate) async fn find(
    core: &Core,
    call: &Call,
    resource: &Arc<Resource>,
) -> Result<Arc<Value>, Status> {
    match version(&call.info.query)? {
        None => core.catch_up().await?,
        Some(revision) => core.wait_for(revision).await?,
    }
    let namespace = if resource.namespaced { call.info.namespace.as_str() } else { "" };
    let stored = core
        .cache_of(resource)?
        .get(&cache::object_key(namespace, &call.info.name))
        .ok_or_else(|| Status::not_found(&resource.group, &resource.plural, &call.info.name))?;
    Ok(resource.convert(&stored))
}

/// The `resourceVersion` of a query.
pub(crate) fn version(query: &Query) -> Result<Option<Revision>, Status> {
    query
        .get("resourceVersion")
        .map(|text| {
            text.parse().map(Revision).map_err(|_| {
                Status::bad_request(format!("Invalid value: {text:?}: not a resource version"))
            })
        })
        .transpose()
}

/// Which state a list is of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum AsOf {
    /// All that was answered before.
    Newest,
    /// This, or anything newer.
    NotOlderThan(Revision),
    /// This and nothing else.
    Exactly(Revision),
}

/// What a list is to be.
#[derive(Clone, Debug, PartialEq, Eq)]
struct ListOptions {
    as_of: AsOf,
    /// 0 is all.
    limit: usize,
    /// The last key of the page before.
    after: Option<String>,
}

/// Where the next page begins. Opaque to clients; named as Kubernetes names it.
#[derive(Debug, Serialize, Deserialize)]
struct ContinueToken {
    v: String,
    rv: u64,
    start: String,
}

const TOKEN_VERSION: &str = "meta.k8s.io/v1";

fn invalid(field: &str, value: &str, why: &str) -> Status {
    let error = FieldError::invalid(field, value, why);
    Status::invalid("meta.k8s.io", "ListOptions", "", &[error])
}

impl ListOptions {
    /// The rules of "Resource versions" in the API concepts.
    fn parse(query: &Query) -> Result<Self, Status> {
        let limit = query.number("limit")?.unwrap_or(0);
        let limit = usize::try_from(limit).map_err(|_| {
            invalid("limit", &limit.to_string(), "must be greater than or equal to 0")
        })?;
        let wanted = version(query)?;
        let matching = query.get("resourceVersionMatch").unwrap_or_default();
        if let Some(token) = query.get("continue") {
            if !matching.is_empty() {
                let why = "resourceVersionMatch is forbidden for continue";
                return Err(invalid("resourceVersionMatch", matching, why));
            }
            if wanted.is_some_and(|revision| revision.0 != 0) {
                return Err(Status::bad_request(
                    "specifying resource version is not allowed when using continue",
                ));
            }
            let token = parse_token(token)?;
            let as_of = AsOf::Exactly(Revision(token.rv));
            return Ok(Self { as_of, limit, after: Some(token.start) });
        }
        let as_of = match (wanted, matching) {
            (None, "") => AsOf::Newest,
            (None, given) => {
                let why = "resourceVersionMatch is forbidden unless resourceVersion is provided";
                return Err(invalid("resourceVersionMatch", given, why));
            }
            (Some(Revision(0)), "Exact") => {
                let why = "resourceVersionMatch \"exact\" is forbidden for resourceVersion \"0\"";
                return Err(invalid("resourceVersionMatch", "Exact", why));
            }
            (Some(revision), "Exact") => AsOf::Exactly(revision),
            // A limit without a rule meant exactly this one before there were rules.
            (Some(revision), "") if limit > 0 && revision.0 > 0 => AsOf::Exactly(revision),
            (Some(revision), "" | "NotOlderThan") => AsOf::NotOlderThan(revision),
            (Some(_), other) => {
                let why = "supported values: Exact, NotOlderThan";
                return Err(invalid("resourceVersionMatch", other, why));
            }
        };
        Ok(Self { as_of, limit, after: None })
    }
}

fn parse_token(text: &str) -> Result<ContinueToken, Status> {
    let invalid = || Status::bad_request("continue key is not valid");
    let json = URL_SAFE_NO_PAD.decode(text.trim_end_matches('=')).map_err(|_| invalid())?;
    let token: ContinueToken = serde_json::from_slice(&json).map_err(|_| invalid())?;
    if token.v != TOKEN_VERSION || token.rv == 0 {
        return Err(invalid());
    }
    Ok(token)
}

fn make_token(revision: Revision, last: &str) -> String {
    let token = ContinueToken { v: TOKEN_VERSION.into(), rv: revision.0, start: last.into() };
    // Plain strings and a number: encoding does not fail.
    URL_SAFE_NO_PAD.encode(serde_json::to_vec(&token).unwrap_or_default())
}

/// A part of a list, stored form.
struct Found {
    items: Vec<Arc<Value>>,
    revision: Revision,
    /// The key of the last item, if more follow.
    last: Option<String>,
    remaining: Option<usize>,
}

/// Answers a list.
pub(crate) async fn list(
    core: &Core,
    call: &Call,
    resource: &Arc<Resource>,
) -> Result<Answer, Status> {
    let accepted = call.accept(&[Shape::Table, Shape::Partial])?;
    let include = call.include()?;
    let options = ListOptions::parse(&call.info.query)?;
    let selection = Selection::parse(resource, &call.info)?;
    let found = select(core, resource, &call.info.namespace, &options, &selection).await?;
    let meta = ListMeta {
        resource_version: found.revision.to_string(),
        continue_token: found.last.as_deref().map(|last| make_token(found.revision, last)),
        // With selectors nobody counts what is left.
        remaining: found.remaining.filter(|left| *left > 0 && selection.is_everything()),
    };
    let items: Vec<_> = found.items.iter().map(|item| resource.convert(item)).collect();
    Ok(respond::list(resource, &items, &meta, accepted, include))
}

async fn select(
    core: &Core,
    resource: &Arc<Resource>,
    namespace: &str,
    options: &ListOptions,
    selection: &Selection,
) -> Result<Found, Status> {
    let cache = core.cache_of(resource)?;
    match options.as_of {
        AsOf::Newest => core.catch_up().await?,
        AsOf::NotOlderThan(revision) => core.wait_for(revision).await?,
        AsOf::Exactly(revision) => {
            core.wait_for(revision).await?;
            if !cache.unchanged_since(revision) {
                return history(core, resource, namespace, options, revision, selection).await;
            }
        }
    }
    let limit = if options.limit == 0 { usize::MAX } else { options.limit };
    let namespace = resource.namespaced.then_some(namespace);
    let (snapshot, page) =
        cache.page(namespace, options.after.as_deref(), limit, |object| selection.matches(object));
    let last = snapshot.items.last().filter(|_| page.more).map(|(key, _)| key.to_string());
    // A page of a list is as of the list's revision, also if it was made from a later state of
    // other resources.
    let revision = match options.as_of {
        AsOf::Exactly(revision) => revision,
        _ => snapshot.revision,
    };
    let items = snapshot.items.into_iter().map(|(_, object)| object).collect();
    Ok(Found { items, revision, last, remaining: Some(page.remaining) })
}

/// A list as of a state that has passed, from the store.
async fn history(
    core: &Core,
    resource: &Arc<Resource>,
    namespace: &str,
    options: &ListOptions,
    revision: Revision,
    selection: &Selection,
) -> Result<Found, Status> {
    let prefix = cache::prefix(&resource.storage);
    let scope = match namespace {
        "" => prefix.clone(),
        namespace => format!("{prefix}{namespace}/"),
    };
    let mut after = options.after.as_ref().map(|key| format!("{prefix}{key}"));
    let limit = if options.limit == 0 { usize::MAX } else { options.limit };
    let mut found = Found { items: Vec::new(), revision, last: None, remaining: None };
    let mut last_key = None;
    loop {
        let range = ListRange {
            prefix: scope.clone(),
            after: after.take(),
            revision: Some(revision),
            limit: HISTORY_PAGE,
        };
        let page = core.store.list(range).await.map_err(|error| match error {
            StoreError::Compacted { .. } if options.after.is_some() => Status::expired(
                "The provided continue parameter is too old to display a consistent list result. \
                 You must start a new list without the continue parameter.",
            ),
            error => store_status(&error),
        })?;
        after = page.items.last().map(|item| item.key.to_string());
        for item in &page.items {
            let object = core.parse_stored(item)?;
            if !selection.matches(&object) {
                continue;
            }
            if found.items.len() == limit {
                found.last = last_key;
                return Ok(found);
            }
            last_key = Some(item.key[prefix.len()..].to_owned());
            found.items.push(object);
        }
        if !page.more {
            return Ok(found);
        }
    }
}

/// All objects that a deletecollection is about, stored form.
pub(crate) async fn collection(
    core: &Core,
    call: &Call,
    resource: &Arc<Resource>,
) -> Result<(Vec<Arc<Value>>, Revision), Status> {
    let options = ListOptions::parse(&call.info.query)?;
    let selection = Selection::parse(resource, &call.info)?;
    let found = select(core, resource, &call.info.namespace, &options, &selection).await?;
    Ok((found.items, found.revision))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lists_are_of_the_state_that_was_asked_for() {
        let parse = |query: &str| ListOptions::parse(&Query::parse(Some(query)));
        let rows = [
            ("", AsOf::Newest),
            ("limit=5", AsOf::Newest),
            ("resourceVersion=0", AsOf::NotOlderThan(Revision(0))),
            ("resourceVersion=0&limit=5", AsOf::NotOlderThan(Revision(0))),
            ("resourceVersion=7", AsOf::NotOlderThan(Revision(7))),
            ("resourceVersion=7&limit=5", AsOf::Exactly(Revision(7))),
            (
                "resourceVersion=7&limit=5&resourceVersionMatch=NotOlderThan",
                AsOf::NotOlderThan(Revision(7)),
            ),
            ("resourceVersion=7&resourceVersionMatch=Exact", AsOf::Exactly(Revision(7))),
        ];
        for (query, as_of) in rows {
            assert_eq!(parse(query).unwrap().as_of, as_of, "{query}");
        }
        for query in [
            "resourceVersionMatch=Exact",
            "resourceVersion=0&resourceVersionMatch=Exact",
            "resourceVersion=7&resourceVersionMatch=Newer",
            "resourceVersion=x",
            "limit=-1",
            "continue=xyz",
        ] {
            assert!(parse(query).is_err(), "{query}");
        }
        let token = make_token(Revision(9), "a/b");
        let next = parse(&format!("limit=2&continue={token}")).unwrap();
        assert_eq!(next.as_of, AsOf::Exactly(Revision(9)));
        assert_eq!(next.after.as_deref(), Some("a/b"));
        assert!(parse(&format!("continue={token}&resourceVersion=8")).is_err());
    }
}
