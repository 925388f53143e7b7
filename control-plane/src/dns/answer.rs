//! Answers to questions that come over the wire.

use std::sync::{
    Arc, PoisonError, RwLock,
    atomic::{AtomicBool, Ordering},
};

use hickory_proto::{
    op::{Edns, Header, HeaderCounts, Message, MessageType, Metadata, OpCode, Query, ResponseCode},
    rr::{DNSClass, Name, Record, RecordType},
};
use hickory_server::{
    net::runtime::Time,
    server::{Request, RequestHandler, ResponseHandler, ResponseInfo},
    zone_handler::MessageResponseBuilder,
};

use super::{
    clients::Clients,
    forward::Forwarder,
    metrics::DnsMetrics,
    zone::{Lookup, Zone},
};

/// How many names may follow each other until an address.
const MOST_ALIASES: usize = 8;
/// The largest answer over UDP (the recommendation of DNS flag day 2020).
const UDP_BYTES: u16 = 1_232;

/// What is said to a question.
#[derive(Debug)]
pub(super) struct Answer {
    pub(super) code: ResponseCode,
    authoritative: bool,
    records: Vec<Record>,
    authorities: Vec<Record>,
    additionals: Vec<Record>,
}

impl Answer {
    fn only(code: ResponseCode) -> Self {
        Self {
            code,
            authoritative: false,
            records: Vec::new(),
            authorities: Vec::new(),
            additionals: Vec::new(),
        }
    }
}

/// Answers from the zone, and asks elsewhere for the rest.
#[derive(Clone)]
pub(crate) struct Responder {
    pub(crate) zone: Arc<RwLock<Zone>>,
    /// Whether the zone is complete; before that nobody is told that a name is not there.
    pub(crate) complete: Arc<AtomicBool>,
    pub(crate) forwarder: Arc<Forwarder>,
    pub(super) clients: Arc<Clients>,
    pub(crate) metrics: DnsMetrics,
}

impl Responder {
    fn look_up(&self, name: &Name, kind: RecordType) -> (Lookup, Option<Record>) {
        let zone = self.zone.read().unwrap_or_else(PoisonError::into_inner);
        (zone.lookup(name, kind), zone.authority())
    }

    async fn answer(&self, query: &Query) -> Answer {
        let mut name = query.name().clone();
        let mut chain = Vec::new();
        let mut ours = true;
        for _ in 0..MOST_ALIASES {
            let (found, authority) = self.look_up(&name, query.query_type());
            if found != Lookup::NotOurs && !self.complete.load(Ordering::Acquire) {
                return Answer::only(ResponseCode::ServFail);
            }
            let (code, records, additionals) = match found {
                Lookup::NotOurs => return self.forward(query, &name, chain).await,
                Lookup::Alias(alias, target) => {
                    chain.push(*alias);
                    if query.query_type() == RecordType::CNAME {
                        (ResponseCode::NoError, Vec::new(), Vec::new())
                    } else {
                        name = target;
                        ours = false;
                        continue;
                    }
                }
                Lookup::Records(mut records, additionals) => {
                    shuffle(&mut records);
                    (ResponseCode::NoError, records, additionals)
                }
                Lookup::NoRecords => (ResponseCode::NoError, Vec::new(), Vec::new()),
                Lookup::NoName if ours => (ResponseCode::NXDomain, Vec::new(), Vec::new()),
                Lookup::NoName => (ResponseCode::NoError, Vec::new(), Vec::new()),
            };
            chain.extend(records);
            let authorities =
                if chain.is_empty() { authority.into_iter().collect() } else { Vec::new() };
            return Answer { code, authoritative: true, records: chain, authorities, additionals };
        }
        Answer::only(ResponseCode::ServFail)
    }

    async fn forward(&self, query: &Query, name: &Name, mut chain: Vec<Record>) -> Answer {
        let mut message = Message::new(0, MessageType::Query, OpCode::Query);
        message.metadata.recursion_desired = true;
        let mut asked = query.clone();
        asked.set_name(name.clone());
        message.add_query(asked);
        let mut edns = Edns::new();
        edns.set_max_payload(UDP_BYTES);
        message.set_edns(edns);
        match self.forwarder.ask(&message).await {
            Ok(answer) => {
                chain.extend(answer.answers);
                Answer {
                    code: answer.metadata.response_code,
                    authoritative: false,
                    records: chain,
                    authorities: answer.authorities,
                    additionals: answer.additionals,
                }
            }
            Err(error) => {
                tracing::debug!(%name, %error, "looking up elsewhere");
                Answer::only(ResponseCode::ServFail)
            }
        }
    }

    /// What to say to a request that may not even be a question.
    pub(super) async fn respond(&self, request: &Request) -> Answer {
        let client = request.src().ip();
        if !self.clients.are_answered(client) {
            if let Some(count) = self.clients.refuse(std::time::Instant::now()) {
                tracing::warn!(
                    %client, count,
                    "refused DNS questions from outside of the cluster's pods and nodes"
                );
            }
            return Answer::only(ResponseCode::Refused);
        }
        if request.metadata.op_code != OpCode::Query
            || request.metadata.message_type != MessageType::Query
        {
            return Answer::only(ResponseCode::NotImp);
        }
        let Ok(info) = request.request_info() else { return Answer::only(ResponseCode::FormErr) };
        if info.query.query_class() != DNSClass::IN {
            return Answer::only(ResponseCode::Refused);
        }
        self.answer(info.query.original()).await
    }
}

/// Many addresses come in another order each time, so that all of them get work.
fn shuffle(records: &mut [Record]) {
    for i in (1..records.len()).rev() {
        records.swap(i, rand::random_range(0..=i));
    }
}

#[async_trait::async_trait]
impl RequestHandler for Responder {
    async fn handle_request<R: ResponseHandler, T: Time>(
        &self,
        request: &Request,
        mut response_handle: R,
    ) -> ResponseInfo {
        let started = std::time::Instant::now();
        let answer = self.respond(request).await;
        let mut metadata = Metadata::response_from_request(&request.metadata);
        metadata.response_code = answer.code;
        metadata.authoritative = answer.authoritative;
        metadata.recursion_available = answer.code != ResponseCode::Refused;
        let mut edns = Edns::new();
        edns.set_max_payload(UDP_BYTES.min(request.max_payload()));
        let mut builder = MessageResponseBuilder::from_message_request(request);
        if request.edns.is_some() {
            builder.edns(&edns);
        }
        let response =
            builder.build(metadata, &answer.records, &answer.authorities, &[], &answer.additionals);
        self.metrics.count(answer.code, answer.authoritative, started.elapsed());
        match response_handle.send_response(response).await {
            Ok(info) => info,
            Err(error) => {
                tracing::debug!(%error, "answering a DNS question");
                metadata.response_code = ResponseCode::ServFail;
                ResponseInfo::from(Header { metadata, counts: HeaderCounts::default() })
            }
        }
    }
}
