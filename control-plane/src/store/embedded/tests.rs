//! Against real files, and a real kill.

use std::{
    io::{BufRead, BufReader},
    process::{Command, Stdio},
    time::{Duration, Instant},
};

use tempfile::TempDir;

use super::*;

fn open(dir: &TempDir, history: u64) -> EmbeddedStore {
    let options = EmbeddedOptions { history, ..EmbeddedOptions::default() };
    EmbeddedStore::open(&dir.path().join("store.redb"), &options).unwrap()
}

fn text(text: &str) -> Bytes {
    Bytes::copy_from_slice(text.as_bytes())
}

fn everything(prefix: &str) -> ListRange {
    ListRange { prefix: prefix.to_owned(), ..ListRange::default() }
}

fn names(page: &Page) -> Vec<(String, String)> {
    page.items
        .iter()
        .map(|item| (item.key.to_string(), String::from_utf8(item.value.to_vec()).unwrap()))
        .collect()
}

fn pairs(pairs: &[(&str, &str)]) -> Vec<(String, String)> {
    pairs.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect()
}

/// Lets files grow to so many bytes, as a full disk does; `None` for as long as they like.
fn let_files_grow(to: Option<u64>) {
    // SAFETY: plain system calls with a structure that outlives them. The limit is this process's,
    // which runs this one test.
    unsafe {
        libc::signal(libc::SIGXFSZ, libc::SIG_IGN);
        let mut limit = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
        assert_eq!(libc::getrlimit(libc::RLIMIT_FSIZE, &raw mut limit), 0);
        limit.rlim_cur = to.unwrap_or(limit.rlim_max);
        assert_eq!(libc::setrlimit(libc::RLIMIT_FSIZE, &raw const limit), 0);
    }
}

#[tokio::test]
async fn a_full_disk_fails_writes_until_there_is_room() {
    let dir = TempDir::new().unwrap();
    let store = open(&dir, 100);
    let first = store.put("before", text("1"), Expect::Absent).await.unwrap();
    let mut watch = store.watch("", first).await.unwrap();
    let length = std::fs::metadata(dir.path().join("store.redb")).unwrap().len();
    let_files_grow(Some(length));
    let large = Bytes::from(vec![b'x'; 1 << 20]);
    let mut refused = 0;
    for number in 0..8 {
        refused += usize::from(
            store.put(&format!("large-{number}"), large.clone(), Expect::Absent).await.is_err(),
        );
    }
    assert!(refused > 0, "it took 8 MiB in {length} bytes");
    assert!(!store.is_healthy());
    let_files_grow(None);
    let after = store.put("after", text("2"), Expect::Absent).await.unwrap();
    assert!(store.is_healthy());
    assert_eq!(store.get("before").await.unwrap().unwrap().modified, first);
    loop {
        let changes = watch.next().await.unwrap().unwrap();
        if changes.iter().any(|change| &*change.key == "after" && change.revision == after) {
            break;
        }
    }
}

#[tokio::test]
async fn a_write_happens_only_if_the_key_is_as_expected() {
    let dir = TempDir::new().unwrap();
    let store = open(&dir, 100);
    assert_eq!(store.current_revision().await.unwrap(), Revision(1));
    let created = store.put("a", text("1"), Expect::Absent).await.unwrap();
    assert_eq!(created, Revision(2));
    let again = store.put("a", text("2"), Expect::Absent).await.unwrap_err();
    assert!(
        matches!(again, StoreError::Conflict { current: Some(ref c), .. } if c.modified == created)
    );
    let updated = store.put("a", text("2"), Expect::Modified(created)).await.unwrap();
    assert!(store.put("a", text("3"), Expect::Modified(created)).await.is_err());
    assert!(store.delete("a", created).await.is_err());
    let found = store.get("a").await.unwrap().unwrap();
    assert_eq!((found.value, found.created, found.modified), (text("2"), created, updated));
    let deleted = store.delete("a", updated).await.unwrap();
    assert_eq!(store.get("a").await.unwrap(), None);
    assert!(matches!(
        store.put("a", text("4"), Expect::Modified(deleted)).await,
        Err(StoreError::Conflict { current: None, .. })
    ));
    let reborn = store.put("a", text("5"), Expect::Absent).await.unwrap();
    assert_eq!(store.get("a").await.unwrap().unwrap().created, reborn);
    assert_eq!(store.current_revision().await.unwrap(), reborn);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn of_racing_writers_one_wins_each_round() {
    let dir = TempDir::new().unwrap();
    let store = Arc::new(open(&dir, 10));
    store.put("counter", text("0"), Expect::Absent).await.unwrap();
    let mut tasks = tokio::task::JoinSet::new();
    for _ in 0..8 {
        let store = Arc::clone(&store);
        tasks.spawn(async move {
            let mut done = 0;
            while done < 25 {
                let seen = store.get("counter").await.unwrap().unwrap();
                let next = std::str::from_utf8(&seen.value).unwrap().parse::<u32>().unwrap() + 1;
                match store
                    .put("counter", text(&next.to_string()), Expect::Modified(seen.modified))
                    .await
                {
                    Ok(_) => done += 1,
                    Err(StoreError::Conflict { .. }) => {}
                    Err(error) => panic!("{error}"),
                }
            }
        });
    }
    while let Some(joined) = tasks.join_next().await {
        joined.unwrap();
    }
    assert_eq!(store.get("counter").await.unwrap().unwrap().value, text("200"));
    assert_eq!(store.current_revision().await.unwrap(), Revision(202));
}

#[tokio::test]
async fn lists_are_as_of_their_revision_and_come_in_pages() {
    let dir = TempDir::new().unwrap();
    let store = open(&dir, 100);
    for (key, value) in [("p/a", "1"), ("p/b", "1"), ("p/c", "1"), ("q/a", "1")] {
        store.put(key, text(value), Expect::Absent).await.unwrap();
    }
    let then = store.current_revision().await.unwrap();
    store.put("p/b", text("2"), Expect::Modified(Revision(3))).await.unwrap();
    store.delete("p/c", Revision(4)).await.unwrap();
    store.put("p/d", text("1"), Expect::Absent).await.unwrap();

    let now = store.list(everything("p/")).await.unwrap();
    assert_eq!(names(&now), pairs(&[("p/a", "1"), ("p/b", "2"), ("p/d", "1")]));
    let past = ListRange { revision: Some(then), limit: 2, ..everything("p/") };
    let first = store.list(past.clone()).await.unwrap();
    assert_eq!(names(&first), pairs(&[("p/a", "1"), ("p/b", "1")]));
    assert!(first.more);
    let rest = store.list(ListRange { after: Some("p/b".into()), ..past }).await.unwrap();
    assert_eq!(names(&rest), pairs(&[("p/c", "1")]));
    assert!(!rest.more);
    assert!(matches!(
        store.list(ListRange { revision: Some(Revision(99)), ..everything("p/") }).await,
        Err(StoreError::Future { .. })
    ));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_watch_has_no_gap_even_when_it_lags() {
    let dir = TempDir::new().unwrap();
    let store = Arc::new(open(&dir, 100_000));
    store.put("w/first", text("x"), Expect::Absent).await.unwrap();
    let mut early = store.watch("w/", Revision(1)).await.unwrap();
    let writer = {
        let store = Arc::clone(&store);
        tokio::spawn(async move {
            for n in 0..400 {
                store.put(&format!("w/{n}"), text("x"), Expect::Absent).await.unwrap();
                store.put(&format!("other/{n}"), text("x"), Expect::Absent).await.unwrap();
            }
        })
    };
    // Nobody reads `early` meanwhile: it falls behind the broadcast and goes back to the log.
    writer.await.unwrap();
    let mut seen = Vec::new();
    while seen.len() < 401 {
        seen.extend(early.next().await.unwrap().unwrap());
    }
    assert!(seen.iter().all(|change| change.key.starts_with("w/")));
    assert!(seen.is_sorted_by(|a, b| a.revision < b.revision));
    let revision = store.current_revision().await.unwrap();
    let mut live = store.watch("", revision).await.unwrap();
    let put = store.put("w/live", text("y"), Expect::Absent).await.unwrap();
    let deleted = store.delete("w/live", put).await.unwrap();
    let mut changes = live.next().await.unwrap().unwrap();
    while changes.len() < 2 {
        changes.extend(live.next().await.unwrap().unwrap());
    }
    assert_eq!((changes[0].revision, &changes[0].value), (put, &Some(text("y"))));
    assert_eq!((changes[1].revision, &changes[1].value), (deleted, &None));
}

#[tokio::test]
async fn what_is_compacted_is_expired_and_what_is_current_stays() {
    let dir = TempDir::new().unwrap();
    let store = open(&dir, 1_000_000);
    let mut revision = store.put("a", text("0"), Expect::Absent).await.unwrap();
    let gone = store.put("gone", text("0"), Expect::Absent).await.unwrap();
    store.delete("gone", gone).await.unwrap();
    for n in 1..=20 {
        revision = store.put("a", text(&n.to_string()), Expect::Modified(revision)).await.unwrap();
    }
    store.compact(Revision(10)).await.unwrap();
    assert_eq!(store.compacted().await.unwrap(), Revision(10));
    assert!(matches!(
        store.watch("", Revision(9)).await,
        Err(StoreError::Compacted { compacted: Revision(10), .. })
    ));
    assert!(matches!(
        store.list(ListRange { revision: Some(Revision(9)), ..everything("") }).await,
        Err(StoreError::Compacted { .. })
    ));
    let page = store.list(ListRange { revision: Some(Revision(10)), ..everything("") }).await;
    assert_eq!(names(&page.unwrap()), pairs(&[("a", "6")]));
    let mut watch = store.watch("", Revision(10)).await.unwrap();
    assert_eq!(watch.next().await.unwrap().unwrap()[0].value, Some(text("7")));
    store.compact(revision).await.unwrap();
    assert_eq!(names(&store.list(everything("")).await.unwrap()), pairs(&[("a", "20")]));
    assert!(matches!(store.compact(Revision(99)).await, Err(StoreError::Future { .. })));
}

#[tokio::test]
async fn history_stays_within_its_bound() {
    let dir = TempDir::new().unwrap();
    let store = open(&dir, 10);
    let mut revision = store.put("a", text("0"), Expect::Absent).await.unwrap();
    for n in 0..100 {
        revision = store.put("a", text(&n.to_string()), Expect::Modified(revision)).await.unwrap();
    }
    assert_eq!(store.compacted().await.unwrap(), Revision(revision.0 - 10));
    drop(store);
    let store = open(&dir, 10);
    assert_eq!(store.current_revision().await.unwrap(), revision);
    assert_eq!(store.get("a").await.unwrap().unwrap().modified, revision);
}

#[tokio::test]
async fn one_file_has_one_owner_and_a_closed_store_says_so() {
    let dir = TempDir::new().unwrap();
    let store = open(&dir, 10);
    let path = dir.path().join("store.redb");
    assert!(EmbeddedStore::open(&path, &EmbeddedOptions::default()).is_err());
    store.close().await;
    assert!(matches!(
        store.put("a", text("1"), Expect::Absent).await,
        Err(StoreError::Closed { .. })
    ));
    drop(store);
    std::fs::write(&path, "no database").unwrap();
    let error = EmbeddedStore::open(&path, &EmbeddedOptions::default()).err().unwrap();
    assert!(error.to_string().contains("store.redb"), "{error}");
}

const CHILD: &str = "KEELSON_TEST_STORE";

/// What the process that will be killed does: write, and tell of each answer.
async fn write_until_killed(path: &Path) {
    let store = Arc::new(EmbeddedStore::open(path, &EmbeddedOptions::default()).unwrap());
    let mut tasks = tokio::task::JoinSet::new();
    for task in 0..4 {
        let store = Arc::clone(&store);
        tasks.spawn(async move {
            for n in 0.. {
                let key = format!("k/{}/{task}-{n}", std::process::id());
                let value = Bytes::from(vec![b'x'; 700]);
                let revision = store.put(&key, value, Expect::Absent).await.unwrap();
                println!("answered {key} {revision}");
            }
        });
    }
    tasks.join_next().await;
}

/// Runs this very test in another process, which writes until it is killed.
#[test]
fn kill_9_loses_no_answered_write() {
    let runtime = || tokio::runtime::Runtime::new().unwrap();
    if let Some(path) = std::env::var_os(CHILD) {
        return runtime().block_on(write_until_killed(Path::new(&path)));
    }
    let dir = TempDir::new().unwrap();
    let path = dir.path().join("store.redb");
    let mut answered = Vec::new();
    for round in 1..=4 {
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "store::embedded::tests::kill_9_loses_no_answered_write"])
            .args(["--nocapture", "--test-threads=1"])
            .env(CHILD, &path)
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
        let mut seen = 0;
        // Reading on after the kill: what was answered before it is in the pipe.
        for line in lines.by_ref() {
            let line = line.unwrap();
            let mut words = line.split("answered ").nth(1).unwrap_or_default().split(' ');
            if let (Some(key), Some(revision)) = (words.next(), words.next()) {
                answered.push((key.to_owned(), revision.parse::<u64>().unwrap()));
                seen += 1;
                if seen == 40 * round {
                    child.kill().unwrap(); // SIGKILL
                }
            }
        }
        child.wait().unwrap();
        assert!(seen >= 40 * round);
        let began = Instant::now();
        let store = EmbeddedStore::open(&path, &EmbeddedOptions::default()).unwrap();
        assert!(began.elapsed() < Duration::from_secs(10));
        runtime().block_on(async {
            for (key, revision) in &answered {
                let found = store.get(key).await.unwrap().unwrap_or_else(|| panic!("lost {key}"));
                assert_eq!(found.modified, Revision(*revision), "{key}");
                assert_eq!(found.value.len(), 700);
            }
            // The log tells the same as the objects.
            let mut watch = store.watch("", Revision(1)).await.unwrap();
            let last = store.current_revision().await.unwrap();
            let mut at = Revision(1);
            while at < last {
                for change in watch.next().await.unwrap().unwrap() {
                    assert_eq!(change.revision, Revision(at.0 + 1));
                    at = change.revision;
                }
            }
        });
    }
}

/// Prints what a commit costs here; asserts only that a lone write does not wait for company.
#[tokio::test]
async fn a_lone_write_is_committed_at_once() {
    let dir = TempDir::new().unwrap();
    let store = open(&dir, 10_000);
    let mut times = Vec::new();
    for n in 0..100 {
        let began = Instant::now();
        store.put(&format!("k/{n}"), Bytes::from(vec![b'x'; 1500]), Expect::Absent).await.unwrap();
        times.push(began.elapsed());
    }
    times.sort();
    println!("a lone write: median {:?}, worst {:?}", times[50], times[99]);
    assert!(times[0] < Duration::from_millis(50));
}
