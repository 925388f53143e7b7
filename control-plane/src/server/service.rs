//! One request from its head to its answer: the same for those that come over TLS and for those of
//! the process itself.
//!
//! ```text
//! request ─ RequestInfo ─ who? ─ as whom? ─ room? ─ may they? ─ handler ─ answer
//!                          401     403       429       403      4xx 5xx
//! ```

use std::{
    any::Any,
    convert::Infallible,
    future::Future,
    panic::AssertUnwindSafe,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
    time::{Duration, Instant},
};

use bytes::Bytes;
use futures::FutureExt as _;
use http::{Method, Request, StatusCode, header, request::Parts};
use http_body_util::{BodyExt, LengthLimitError, Limited, combinators::UnsyncBoxBody};
use rustls::pki_types::UnixTime;
use tokio::sync::OwnedSemaphorePermit;
use tower::Service;

use super::{
    core::{Call, Core},
    negotiate::{self, Accepted},
    nonresource,
    objects::{delete, read, selection, subresources, watch, write},
    openapi,
    request::RequestInfo,
    respond::{self, Answer, Body, BoxError},
    streams,
};
use crate::{
    auth::{Attributes, Credentials, Decision, UserInfo, impersonation, messages},
    pki::client_certificates::ClientCertificate,
    registry::Resource,
    status::Status,
};

/// How much of a body that is too large is read and thrown away, and for how long.
const DRAIN_BYTES: usize = 32 << 20;
const DRAIN_TIME: Duration = Duration::from_secs(5);

/// A body on its way in.
pub(crate) type RequestBody = UnsyncBoxBody<Bytes, BodyError>;

/// A body broke off. A type of its own, since for a bare box the compiler does not see that
/// futures over it can be sent.
#[derive(Debug, thiserror::Error)]
#[error(transparent)]
pub(crate) struct BodyError(BoxError);

/// What is known of the connection that a request came over.
#[derive(Clone, Debug)]
pub(crate) struct Peer {
    /// The client's certificate if it showed one, or why that is no good.
    pub(crate) certificate: Option<Result<ClientCertificate, String>>,
}

impl Peer {
    /// The certificate as it counts now.
    fn certificate_now(&self) -> Option<Result<Vec<u8>, String>> {
        let now = UnixTime::now();
        self.certificate.as_ref().map(|judged| match judged {
            Ok(certificate) => certificate.der_at(now),
            Err(reason) => Err(reason.clone()),
        })
    }
}

/// The API server as a service.
#[derive(Clone)]
pub struct ApiService {
    core: Arc<Core>,
}

impl ApiService {
    pub(crate) fn new(core: Arc<Core>) -> Self {
        Self { core }
    }
}

impl<B> Service<Request<B>> for ApiService
where
    B: http_body::Body<Data = Bytes> + Send + 'static,
    B::Error: Into<BoxError>,
{
    type Response = Answer;
    type Error = Infallible;
    type Future = Pin<Box<dyn Future<Output = Result<Answer, Infallible>> + Send>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: Request<B>) -> Self::Future {
        let core = Arc::clone(&self.core);
        let request =
            request.map(|body| body.map_err(|error| BodyError(error.into())).boxed_unsync());
        Box::pin(async move {
            let served = AssertUnwindSafe(serve(core, request)).catch_unwind().await;
            // One request's fault is no other's: without this, all streams of its connection broke.
            Ok(served.unwrap_or_else(|panic| panicked(&*panic)))
        })
    }
}

/// The answer to a request that the server stumbled over.
fn panicked(panic: &(dyn Any + Send)) -> Answer {
    let why = panic
        .downcast_ref::<&str>()
        .copied()
        .or_else(|| panic.downcast_ref::<String>().map(String::as_str))
        .unwrap_or("no reason");
    tracing::error!(why, "a request made the server panic");
    let status = Status::internal("the server panicked on this request; its log says more");
    respond::status(&status, Accepted::default())
}

async fn serve(core: Arc<Core>, request: Request<RequestBody>) -> Answer {
    let began = Instant::now();
    let uri = request.uri();
    let info = RequestInfo::of(request.method(), uri.path(), uri.query());
    let is_head = request.method() == Method::HEAD;
    // A failure that can't be sent in the form the client wants is sent in ours.
    let pretty = info.query.get("pretty");
    let accepted: Accepted = negotiate::accept(request.headers(), pretty, &[]).unwrap_or_default();
    let mut answer = match process(&core, &info, request).await {
        Ok(answer) => answer,
        Err(status) => {
            if status.code >= 500 {
                tracing::warn!(path = %info.path, verb = info.verb, %status, "a request failed");
            }
            respond::status(&status, accepted)
        }
    };
    let size = http_body::Body::size_hint(answer.body()).exact();
    let took = (!info.is_long_running()).then(|| began.elapsed());
    core.metrics.request(&info, answer.status().as_u16(), took, size);
    if is_head {
        *answer.body_mut() = respond::full(Bytes::new());
    }
    answer
}

async fn process(
    core: &Arc<Core>,
    info: &RequestInfo,
    request: Request<RequestBody>,
) -> Result<Answer, Status> {
    let (parts, body) = request.into_parts();
    let user = identify(core, info, &parts).await?;
    let user = impersonation::impersonate(&parts.headers, &user, &*core.security.authorizer)?
        .unwrap_or(user);
    let request = Request::from_parts(parts, body);
    if info.is_long_running() {
        authorize(core, &user, info)?;
        return dispatch(core, info, user, request).await;
    }
    let _room = room(core, info, &user)?;
    let _counted = core.metrics.in_flight(info.is_mutating());
    authorize(core, &user, info)?;
    let answered = dispatch(core, info, user, request);
    match tokio::time::timeout(core.limits.request_timeout, answered).await {
        Ok(answered) => answered,
        Err(_) => {
            core.metrics.rejected(info, 504);
            Err(Status::timeout("request did not complete within the allotted timeout", 1))
        }
    }
}

/// Who asks.
async fn identify(core: &Core, info: &RequestInfo, request: &Parts) -> Result<UserInfo, Status> {
    // Only callers in this process can have put one there.
    if let Some(user) = request.extensions.get::<UserInfo>() {
        return Ok(user.clone());
    }
    let bearer = request.headers.get(header::AUTHORIZATION).and_then(|value| {
        let (scheme, token) = value.to_str().ok()?.trim().split_once(' ')?;
        scheme.eq_ignore_ascii_case("bearer").then(|| token.trim().to_owned())
    });
    let credentials = Credentials {
        client_certificate: request.extensions.get::<Peer>().and_then(Peer::certificate_now),
        bearer_token: bearer.or_else(|| websocket_token(request)),
    };
    match core.security.authenticator.authenticate(&credentials).await {
        Ok(Some(user)) => {
            core.metrics.authentication("success");
            Ok(user)
        }
        Ok(None) => {
            let anonymous = core.security.anonymous.user(&info.path);
            let result = if anonymous.is_some() { "success" } else { "failure" };
            core.metrics.authentication(result);
            anonymous.ok_or_else(Status::unauthorized)
        }
        Err(reason) => {
            core.metrics.authentication("error");
            tracing::debug!(reason, "credentials were refused");
            Err(Status::unauthorized())
        }
    }
}

/// Browsers can set no header on a WebSocket: the token comes as a subprotocol.
fn websocket_token(request: &Parts) -> Option<String> {
    use base64::{Engine as _, engine::general_purpose::URL_SAFE_NO_PAD};
    let offered = request.headers.get(header::SEC_WEBSOCKET_PROTOCOL)?.to_str().ok()?;
    let token = offered
        .split(',')
        .find_map(|protocol| protocol.trim().strip_prefix(streams::TOKEN_PROTOCOL))?;
    String::from_utf8(URL_SAFE_NO_PAD.decode(token).ok()?).ok()
}

/// A place among the requests that are served at a time.
fn room(
    core: &Core,
    info: &RequestInfo,
    user: &UserInfo,
) -> Result<Option<OwnedSemaphorePermit>, Status> {
    // Administrators, and those who ask whether the server lives, always get through.
    let exempt = user.groups.iter().any(|group| group == "system:masters")
        || matches!(info.path.as_str(), "/healthz" | "/livez" | "/readyz");
    if exempt {
        return Ok(None);
    }
    let seats = if info.is_mutating() { &core.writes } else { &core.reads };
    match Arc::clone(seats).try_acquire_owned() {
        Ok(seat) => Ok(Some(seat)),
        Err(_) => {
            core.metrics.rejected(info, 429);
            Err(Status::too_many_requests("too many requests, please try again later", 1))
        }
    }
}

pub(crate) fn attributes(user: &UserInfo, info: &RequestInfo) -> Attributes {
    let field_selector = match info.verb {
        "list" | "watch" | "deletecollection" => selection::required_fields(&info.query),
        _ => Vec::new(),
    };
    let mut name = info.name.clone();
    if name.is_empty()
        && let Some((_, only)) = field_selector.iter().find(|(field, _)| field == "metadata.name")
    {
        name.clone_from(only);
    }
    Attributes {
        user: user.clone(),
        verb: info.verb.to_owned(),
        resource_request: info.resource_request,
        group: info.group.clone(),
        version: info.version.clone(),
        resource: info.resource.clone(),
        subresource: info.subresource.clone(),
        namespace: info.namespace.clone(),
        name,
        field_selector,
        path: info.path.clone(),
    }
}

fn authorize(core: &Core, user: &UserInfo, info: &RequestInfo) -> Result<(), Status> {
    check(core, &attributes(user, info))
}

fn check(core: &Core, attributes: &Attributes) -> Result<(), Status> {
    let (result, why) = match core.security.authorizer.authorize(attributes) {
        Decision::Allow(_) => {
            core.metrics.authorization("allowed");
            return Ok(());
        }
        Decision::Deny(why) => ("denied", why),
        Decision::NoOpinion(why) => ("no-opinion", why),
    };
    core.metrics.authorization(result);
    Err(messages::forbidden(attributes, &why).into())
}

impl Core {
    /// A patch that turns out to create needs to be allowed that too.
    pub(crate) fn authorize_create(&self, call: &Call, resource: &Resource) -> Result<(), Status> {
        let mut attributes = attributes(&call.user, &call.info);
        attributes.verb = "create".to_owned();
        attributes.subresource.clear();
        debug_assert_eq!(attributes.resource, resource.plural);
        check(self, &attributes)
    }
}

async fn dispatch(
    core: &Arc<Core>,
    info: &RequestInfo,
    user: UserInfo,
    request: Request<RequestBody>,
) -> Result<Answer, Status> {
    let call = Call { info: info.clone(), user, headers: request.headers().clone() };
    if !info.resource_request {
        return match info.path.strip_prefix("/openapi/") {
            Some(path) => openapi::serve(core, &call, request.method(), path).await,
            None => nonresource::serve(core, &call, request.method()),
        };
    }
    let resource = core
        .registry
        .resource(&info.group, &info.version, &info.resource)
        .cloned()
        .ok_or_else(Status::unknown_path)?;
    if resource.namespaced
        && info.namespace.is_empty()
        && !(matches!(info.verb, "list" | "watch")
            || info.verb == "create" && resource.virtual_only)
        || !resource.namespaced && !info.namespace.is_empty() && resource.plural != "namespaces"
    {
        // All namespaces can be read at once, and not written.
        return Err(if matches!(info.verb, "create" | "deletecollection") {
            Status::method_not_allowed()
        } else {
            Status::unknown_path()
        });
    }
    if info.subresource.is_empty() {
        if !resource.allows(info.verb) {
            return Err(Status::method_not_allowed());
        }
        return whole(core, &call, &resource, request).await;
    }
    let allowed = resource
        .subresource(&info.subresource)
        .ok_or_else(Status::unknown_path)?
        .verbs
        .contains(&info.verb);
    if !allowed {
        return Err(Status::method_not_allowed());
    }
    if info.name.is_empty() {
        return Err(Status::unknown_path());
    }
    subresource(core, &call, &resource, request).await
}

async fn whole(
    core: &Arc<Core>,
    call: &Call,
    resource: &Arc<Resource>,
    request: Request<RequestBody>,
) -> Result<Answer, Status> {
    match call.info.verb {
        "get" => return read::get(core, call, resource).await,
        "list" => return read::list(core, call, resource).await,
        "watch" => return watch::watch(core, call, resource).await,
        "create" if !call.info.name.is_empty() => return Err(Status::method_not_allowed()),
        _ => {}
    }
    let body = read_body(core, request).await?;
    match call.info.verb {
        "create" if resource.virtual_only => {
            if resource.plural == "bindings" {
                let pods = core.registry.resource("", "v1", "pods").cloned();
                let pods = pods.ok_or_else(Status::unknown_path)?;
                return subresources::bind(core, call, &pods, &body).await;
            }
            review(core, call, resource, &body)
        }
        "create" => write::create(core, call, resource, &body).await,
        "update" => write::update(core, call, resource, &body).await,
        "patch" => write::patch(core, call, resource, &body).await,
        "delete" => delete::delete(core, call, resource, &body).await,
        "deletecollection" => delete::delete_collection(core, call, resource, &body).await,
        _ => Err(Status::method_not_allowed()),
    }
}

async fn subresource(
    core: &Arc<Core>,
    call: &Call,
    resource: &Arc<Resource>,
    request: Request<RequestBody>,
) -> Result<Answer, Status> {
    let info = &call.info;
    match (info.subresource.as_str(), info.verb) {
        ("log" | "exec" | "attach" | "portforward" | "proxy", _) => {
            return streams::serve(core, call, resource, request).await;
        }
        ("scale", "get") => return subresources::get_scale(core, call, resource).await,
        (_, "get") => return read::get(core, call, resource).await,
        _ => {}
    }
    let body = read_body(core, request).await?;
    match (info.subresource.as_str(), info.verb) {
        ("scale", _) => subresources::set_scale(core, call, resource, &body).await,
        ("binding", _) => subresources::bind(core, call, resource, &body).await,
        ("eviction", _) => subresources::evict(core, call, resource, &body).await,
        ("token", _) => token(core, call, &body),
        (_, "update") => write::update(core, call, resource, &body).await,
        (_, "patch") => write::patch(core, call, resource, &body).await,
        _ => Err(Status::method_not_allowed()),
    }
}

/// A review is answered and not kept.
fn review(
    core: &Core,
    call: &Call,
    resource: &Arc<Resource>,
    body: &Bytes,
) -> Result<Answer, Status> {
    let accepted = call.accept(&[])?;
    let options = write::WriteOptions::parse(call)?;
    let given = write::parse_document(body, write::body_format(call)?)?;
    let decoded = resource.decode(given, options.validation)?;
    let namespace = &call.info.namespace;
    let answers = &core.security.answers;
    let answer = answers.review(&resource.plural, namespace, &call.user, &decoded.object)?;
    let mut answer = respond::document(StatusCode::CREATED, &answer, accepted);
    respond::warn(&mut answer, &decoded.warnings);
    Ok(answer)
}

fn token(core: &Core, call: &Call, body: &Bytes) -> Result<Answer, Status> {
    let accepted = call.accept(&[])?;
    let given = write::parse_document(body, write::body_format(call)?)?;
    let info = &call.info;
    // NodeRestriction and others have their say, as on what is stored.
    let resource = core
        .registry
        .resource(&info.group, &info.version, &info.resource)
        .ok_or_else(Status::unknown_path)?;
    let target = super::core::Target {
        namespace: &info.namespace,
        name: &info.name,
        subresource: "token",
        old: None,
    };
    let mut given = given;
    let operation = crate::admission::Operation::Create;
    core.admit(call, resource, operation, target, false, Some(&mut given))?;
    let answer = core.security.answers.token(&info.namespace, &info.name, &given)?;
    Ok(respond::document(StatusCode::CREATED, &answer, accepted))
}

/// All of a body, within bounds.
async fn read_body(core: &Core, request: Request<RequestBody>) -> Result<Bytes, Status> {
    let limit = core.limits.max_body_bytes;
    let mut body = request.into_body();
    match Limited::new(&mut body, limit).collect().await {
        Ok(body) => Ok(body.to_bytes()),
        Err(error) if error.is::<LengthLimitError>() => {
            // Many clients read no answer before all is sent.
            let _ = tokio::time::timeout(DRAIN_TIME, drain(body)).await;
            Err(Status::too_large(&format!("limit is {limit}")))
        }
        Err(error) => Err(Status::bad_request(format!("the body broke off: {error}"))),
    }
}

/// Throws away what is left of a body that is too large, within bounds.
async fn drain(mut body: RequestBody) {
    let mut left = DRAIN_BYTES;
    while let Some(Ok(frame)) = body.frame().await {
        left = left.saturating_sub(frame.data_ref().map_or(0, Bytes::len));
        if left == 0 {
            return;
        }
    }
}

/// Nothing but what is in it.
pub(crate) fn empty() -> Body {
    respond::full(Bytes::new())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_panic_is_an_answer() {
        let stumbles = AssertUnwindSafe(async { panic!("no such thing") }).catch_unwind().await;
        let Err(panic): Result<(), _> = stumbles else { unreachable!() };
        let answer = panicked(&*panic);
        assert_eq!(answer.status(), StatusCode::INTERNAL_SERVER_ERROR);
        let body = answer.into_body().collect().await.unwrap().to_bytes();
        let status: serde_json::Value = serde_json::from_slice(&body).unwrap();
        assert_eq!(status["reason"], "InternalError");
    }
}
