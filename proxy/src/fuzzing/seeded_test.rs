//! The targets over the committed seeds, and over random bytes.

use std::{
    cmp::Reverse,
    path::PathBuf,
    time::{Duration, Instant},
};

use rand::{Rng, SeedableRng, rngs::SmallRng};

use super::{netlink_answers, objects::try_out, objects_to_rules, reached::Reached};
use crate::{
    model::Family,
    netns::Namespace,
    nftables::{
        attribute::{Header, Writer},
        batch::{Batch, TABLE},
        layout,
        uapi::*,
        wire::Wire,
    },
};

/// For how long random bytes are tried.
const TIME: Duration = Duration::from_secs(8);
/// Seeds whose names begin so are there for what they reach.
const REACHES: &str = "reaches-";
/// At least so many are, however slow the machine is.
const LEAST: u64 = 20;

/// Names the input when a target panics.
struct Named(String);

impl Drop for Named {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("the input was {}", self.0);
        }
    }
}

fn folder(target: &str) -> PathBuf {
    [env!("CARGO_MANIFEST_DIR"), "..", "fuzz", "seeds", target].iter().collect()
}

/// Runs a target in a network namespace of its own; what came of the seeds.
fn run<T: Send + 'static>(target: &'static str, body: fn(&[u8]) -> T, longest: usize) -> Vec<T> {
    let host = Namespace::new();
    host.run(move || {
        let mut came = Vec::new();
        let files = std::fs::read_dir(folder(target)).unwrap().map(|file| file.unwrap().path());
        let mut files: Vec<PathBuf> = files.collect();
        files.sort();
        assert!(files.len() >= 5, "there are seeds");
        for file in files {
            let _named = Named(file.display().to_string());
            came.push(body(&std::fs::read(&file).unwrap()));
        }
        let begin = Instant::now();
        for seed in 0.. {
            if seed >= LEAST && begin.elapsed() >= TIME {
                break;
            }
            let _named = Named(format!("that of random seed {seed}"));
            body(&random(seed, longest));
        }
        came
    })
}

fn random(seed: u64, longest: usize) -> Vec<u8> {
    let mut random = SmallRng::seed_from_u64(seed);
    let mut bytes = vec![0; random.next_u64() as usize % longest];
    random.fill_bytes(&mut bytes);
    bytes
}

/// With `KEELSON_GOLDEN=write` those seeds are chosen anew that are there for what they reach: of
/// what `make fuzz` has found so far, few inputs that reach all that other seeds don't.
fn renew_objects() {
    if std::env::var_os("KEELSON_GOLDEN").is_none() {
        return;
    }
    let seeds = folder("objects");
    let corpus = seeds.join("../../corpus/objects");
    let files = std::fs::read_dir(corpus).unwrap().map(|file| file.unwrap().path());
    let inputs: Vec<Vec<u8>> = files.map(|file| std::fs::read(file).unwrap()).collect();
    let mut others = Vec::new();
    for seed in std::fs::read_dir(&seeds).unwrap().map(|file| file.unwrap().path()) {
        if seed.file_name().unwrap().to_str().unwrap().starts_with(REACHES) {
            std::fs::remove_file(seed).unwrap();
        } else {
            others.push(std::fs::read(seed).unwrap());
        }
    }
    let reach = |inputs: Vec<Vec<u8>>| -> Vec<(Vec<u8>, Reached)> {
        let reached = |input: Vec<u8>| (input.clone(), try_out(&input));
        Namespace::new().run(move || inputs.into_iter().map(reached).collect())
    };
    let mut all = Reached::default();
    reach(others).into_iter().for_each(|(_, reached)| all.extend(reached));
    let reached = reach(inputs);
    loop {
        let new = |one: &(Vec<u8>, Reached)| (one.1.beyond(&all).len(), Reverse(one.0.len()));
        let (input, best) = reached.iter().max_by_key(|one| new(one)).unwrap();
        let Some(first) = best.beyond(&all).into_iter().next() else { break };
        std::fs::write(seeds.join(format!("{REACHES}{first}")), input).unwrap();
        all.extend(best.clone());
    }
}

#[test]
fn every_object_makes_rules_that_are_taken() {
    renew_objects();
    let mut reached = Reached::default();
    run("objects", try_out, 1_500).into_iter().for_each(|one| reached.extend(one));
    assert_eq!(reached.missing(), [], "no seed in fuzz/seeds/objects comes to these");
}

/// What the kernel answers to a message.
fn answers(
    subsystem: u8,
    message: u8,
    flags: u16,
    attributes: &dyn Fn(&mut Writer),
) -> Vec<Vec<u8>> {
    let mut writer = Writer::default();
    let kind = u16::from(subsystem) << 8 | u16::from(message);
    let flags = NLM_F_REQUEST | flags;
    writer.message(Header { kind, flags, sequence: 1, family: 2, resource: 0 }, attributes);
    said(writer.bytes())
}

fn said(question: &[u8]) -> Vec<Vec<u8>> {
    let mut wire = Wire::open().unwrap();
    wire.send(question).unwrap();
    let mut answers = Vec::new();
    while let Some(answer) = wire.read().unwrap() {
        answers.push(answer.to_vec());
    }
    answers
}

/// A listing of what the table has, or a set of it.
fn listing(message: u8, table: u16, set: Option<&'static str>) -> Vec<Vec<u8>> {
    answers(NFNL_SUBSYS_NFTABLES, message, NLM_F_DUMP, &|w| {
        w.text_attribute(table, TABLE);
        set.into_iter().for_each(|set| w.text_attribute(NFTA_SET_ELEM_LIST_SET, set));
    })
}

/// Writes what a kernel really says, cut to what a fuzzer can work with.
fn write_seeds() {
    const CUT: usize = 3_000;
    const CONNTRACK: u8 = 1;
    let elements = |set| listing(NFT_MSG_GETSETELEM, NFTA_SET_ELEM_LIST_TABLE, Some(set));
    let mut refused = Batch::new(Family::V4);
    refused.delete_chain("nowhere");
    let seeds = [
        ("0-table", 0, answers(NFNL_SUBSYS_NFTABLES, NFT_MSG_GETTABLE, NLM_F_DUMP, &|_| {})),
        ("0-sets", 0, listing(NFT_MSG_GETSET, NFTA_SET_TABLE, None)),
        ("0-chains", 0, listing(NFT_MSG_GETCHAIN, NFTA_CHAIN_TABLE, None)),
        ("0-rules", 0, listing(NFT_MSG_GETRULE, NFTA_RULE_TABLE, None)),
        ("0-services", 0, elements(layout::SERVICES)),
        ("0-endpoints", 0, elements(layout::ENDPOINTS)),
        ("0-sticky", 0, elements(layout::STICKY)),
        ("0-firewall", 0, elements(layout::FIREWALL)),
        ("3-services", 3, elements(layout::SERVICES)),
        ("1-generation", 1, answers(NFNL_SUBSYS_NFTABLES, NFT_MSG_GETGEN, 0, &|_| {})),
        ("2-refusal", 2, said(refused.finish())),
        ("4-no-table", 4, elements("nothing")),
        ("6-connections", 6, answers(CONNTRACK, 1, NLM_F_DUMP, &|_| {})),
    ];
    for (name, conversation, answers) in seeds {
        assert!(!answers.is_empty(), "{name}");
        let mut bytes = vec![0, conversation];
        for answer in answers {
            let answer = &answer[..answer.len().min(CUT)];
            bytes.extend_from_slice(&(answer.len() as u16).to_be_bytes());
            bytes.extend_from_slice(answer);
        }
        std::fs::write(folder("netlink").join(name), bytes).unwrap();
    }
}

/// With `KEELSON_GOLDEN=write` the seeds are written anew, from what this kernel says.
fn renew_seeds() {
    if std::env::var_os("KEELSON_GOLDEN").is_none() {
        return;
    }
    let host = Namespace::new();
    host.sh("nft 'add table ip t; add chain ip t c { type filter hook output priority 0; }; \
                  add rule ip t c ct state new accept'");
    host.run(|| {
        let socket = std::net::UdpSocket::bind("127.0.0.1:0").unwrap();
        socket.send_to(b"?", "127.0.0.1:9").unwrap();
        // Objects of which much comes.
        let much =
            |set| listing(NFT_MSG_GETSETELEM, NFTA_SET_ELEM_LIST_TABLE, Some(set))[0].len() > 300;
        let rich = (0..2_000).find(|seed| {
            objects_to_rules(&random(*seed, 1_500));
            [layout::SERVICES, layout::ENDPOINTS, layout::STICKY].into_iter().all(much)
        });
        assert!(rich.is_some());
        write_seeds();
    });
}

#[test]
fn no_answer_of_the_kernel_panics_or_hangs() {
    renew_seeds();
    run("netlink", netlink_answers, 4_000);
}
