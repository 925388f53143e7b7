//! Logs, commands and attachments.

use std::time::Duration;

use keelson_runtime_shim::{PodRuntime, runtime::*};
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use crate::{
    fixture::{Node, in_namespaces, until},
    lines,
};

#[test]
fn no_line_is_lost_and_long_ones_are_split() {
    in_namespaces("streams::no_line_is_lost_and_long_ones_are_split", async {
        let node = Node::start().await;
        let pod = node.pod("one", |_| {}).await;
        let script = "i=0; while [ $i -lt 20000 ]; do echo line $i; i=$((i+1)); done; \
                      head -c 40000 /dev/zero; echo";
        let id = node.container(&pod, "c", script, |_| {}).await;
        node.runtime.start_container(&id).await.unwrap();
        // Rotated while it writes: what is between the two files is in one of them.
        let log = node.runtime.container_status(&id).await.unwrap().log_path;
        let old = log.with_extension("old");
        until("it writes", || async { std::fs::metadata(&log).is_ok_and(|m| m.len() > 5000) })
            .await;
        std::fs::rename(&log, &old).unwrap();
        node.runtime.reopen_container_log(&id).await.unwrap();
        node.exited(&id).await;
        let mut all = lines(&old);
        all.extend(lines(&log));
        let numbered = all.iter().filter(|(_, tag, text)| tag == "F" && text.starts_with("line "));
        assert!(numbered.map(|(_, _, t)| t.clone()).eq((0..20000).map(|i| format!("line {i}"))));
        let tail: Vec<_> =
            all[20000..].iter().map(|(_, tag, text)| (tag.as_str(), text.len())).collect();
        assert_eq!(tail, [("P", 16384), ("P", 16384), ("F", 40000 - 2 * 16384)]);
        node.end().await;
    });
}

#[test]
fn commands_run_in_containers() {
    in_namespaces("streams::commands_run_in_containers", async {
        let node = Node::start().await;
        let pod = node.pod("one", |_| {}).await;
        let id = node.started(&pod, "c", "sleep 1000").await;
        let run = |script: &str| {
            let command = ["sh".to_owned(), "-c".to_owned(), script.to_owned()];
            let runtime = node.runtime.clone();
            let id = id.clone();
            async move { runtime.exec_sync(&id, &command, Some(Duration::from_secs(10))).await }
        };
        let output = run("echo hello; echo oops >&2; exit 5").await.unwrap();
        assert_eq!(output.exit_code, 5);
        assert_eq!(
            (output.stdout.as_slice(), output.stderr.as_slice()),
            (&b"hello\n"[..], &b"oops\n"[..])
        );

        // The filter, the capabilities and the cgroup are the container's.
        let output =
            run("grep -E '^(Seccomp|CapBnd|NoNewPrivs):' /proc/self/status; cat /proc/1/cmdline")
                .await
                .unwrap();
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        assert!(text.contains("Seccomp:\t2"), "{text}");
        assert!(text.contains("CapBnd:\t00000000a80425fb"), "{text}");
        assert!(text.contains("sleep"), "{text}");

        let late = node
            .runtime
            .exec_sync(&id, &["sleep".into(), "100".into()], Some(Duration::from_millis(100)))
            .await;
        assert!(matches!(late, Err(RuntimeError::Timeout { .. })), "{late:?}");
        let missing = node.runtime.exec_sync(&id, &["nothing-here".into()], None).await;
        assert!(missing.unwrap_err().to_string().contains("not found in $PATH"));

        // Standard input is handed through, and its end.
        let request = ExecRequest {
            command: vec!["cat".into()],
            stdin: true,
            stdout: true,
            ..ExecRequest::default()
        };
        let mut session = node.runtime.exec(&id, &request).await.unwrap();
        let mut stdin = session.stdin.take().unwrap();
        stdin.write_all(b"through").await.unwrap();
        drop(stdin);
        let mut text = String::new();
        session.stdout.take().unwrap().read_to_string(&mut text).await.unwrap();
        assert_eq!(text, "through");
        assert_eq!(session.exit.await.unwrap().unwrap(), 0);

        // A terminal has a size, and says who has it.
        // A change of size is told on another way than what is typed.
        let script = "read x; n=0; while [ \"$(stty size)\" != '17 91' ] && [ $n -lt 1000 ]; do \
                      n=$((n+1)); sleep 0.01; done; stty size; tty; exit 4";
        let request = ExecRequest {
            command: vec!["sh".into(), "-c".into(), script.into()],
            stdin: true,
            stdout: true,
            tty: true,
            ..ExecRequest::default()
        };
        let mut session = node.runtime.exec(&id, &request).await.unwrap();
        let size = TerminalSize { width: 91, height: 17 };
        session.resize.as_ref().unwrap().send(size).await.unwrap();
        session.stdin.as_mut().unwrap().write_all(b"go\n").await.unwrap();
        let mut text = String::new();
        session.stdout.take().unwrap().read_to_string(&mut text).await.unwrap();
        assert!(text.contains("17 91") && text.contains("/dev/pts/0"), "{text:?}");
        assert_eq!(session.exit.await.unwrap().unwrap(), 4);
        node.end().await;
    });
}

#[test]
fn attaching_joins_the_streams() {
    in_namespaces("streams::attaching_joins_the_streams", async {
        let node = Node::start().await;
        let pod = node.pod("one", |_| {}).await;
        let id = node
            .container(&pod, "c", "while read line; do echo got $line; done; echo end", |c| {
                c.stdin = true;
                c.stdin_once = true;
            })
            .await;
        node.runtime.start_container(&id).await.unwrap();
        let request = ExecRequest { stdin: true, stdout: true, ..ExecRequest::default() };
        let mut session = node.runtime.attach(&id, &request).await.unwrap();
        let mut stdin = session.stdin.take().unwrap();
        stdin.write_all(b"one\ntwo\n").await.unwrap();
        drop(stdin);
        let mut text = String::new();
        session.stdout.take().unwrap().read_to_string(&mut text).await.unwrap();
        assert_eq!(text, "got one\ngot two\nend\n");
        assert_eq!(session.exit.await.unwrap().unwrap(), 0);
        let status = node.exited(&id).await;
        assert_eq!(lines(&status.log_path).len(), 3);

        let id = node
            .container(&pod, "t", "stty -echo; while read line; do echo got $line; done", |c| {
                c.stdin = true;
                c.tty = true;
            })
            .await;
        node.runtime.start_container(&id).await.unwrap();
        let mut session = node.runtime.attach(&id, &request).await.unwrap();
        session.stdin.as_mut().unwrap().write_all(b"one\n").await.unwrap();
        let mut buffer = [0; 256];
        let mut seen = String::new();
        while !seen.contains("got one") {
            let n = session.stdout.as_mut().unwrap().read(&mut buffer).await.unwrap();
            assert_ne!(n, 0, "{seen}");
            seen.push_str(&String::from_utf8_lossy(&buffer[..n]));
        }
        node.end().await;
    });
}
