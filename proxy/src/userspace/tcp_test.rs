//! TCP through relays: what a connection goes through besides being set up.

use std::{
    io::{ErrorKind, Read, Write},
    net::{Shutdown, TcpListener, TcpStream},
    sync::mpsc,
    time::Duration,
};

use super::fixture::{FAMILIES, Net, ask, connect, everywhere, pod};
use crate::{
    model::Family,
    ruleset::Action,
    until::{PATIENCE, until},
};

/// Has a pod do something with one connection; what comes of it is sent here.
fn once<T: Send + 'static>(
    net: &Net,
    family: Family,
    n: u8,
    serve: impl FnOnce(TcpStream) -> T + Send + 'static,
) -> mpsc::Receiver<T> {
    let (done, result) = mpsc::channel();
    let endpoint = pod(family, n);
    net.pods[usize::from(n) - 1].run(move || {
        let listener = TcpListener::bind((endpoint.address, endpoint.port)).unwrap();
        std::thread::spawn(move || {
            let (stream, _) = listener.accept().unwrap();
            stream.set_read_timeout(Some(PATIENCE)).unwrap();
            let _ = done.send(serve(stream));
        });
    });
    result
}

#[test]
fn either_side_may_close_its_half_first() {
    for family in FAMILIES {
        let net = Net::new(2);
        let mut host = net.relays(family, everywhere);
        host.set(1, &[1]);
        host.set(2, &[2]);

        // The client says all it has to say, then listens.
        let heard = once(&net, family, 1, |mut stream| {
            let mut said = Vec::new();
            stream.read_to_end(&mut said).unwrap();
            stream.write_all(&said).unwrap();
            said.len()
        });
        let mut stream = connect(&net.client, host.service(1)).unwrap();
        let much = vec![7; 3_000_000];
        stream.write_all(&much).unwrap();
        stream.shutdown(Shutdown::Write).unwrap();
        let mut back = Vec::new();
        stream.read_to_end(&mut back).unwrap();
        assert!(back == much, "{} bytes came back", back.len());
        assert_eq!(heard.recv_timeout(PATIENCE), Ok(much.len()));

        // The endpoint is done first, and still hears the client.
        let heard = once(&net, family, 2, |mut stream| {
            stream.write_all(b"all").unwrap();
            stream.shutdown(Shutdown::Write).unwrap();
            let mut said = String::new();
            stream.read_to_string(&mut said).map(|_| said).unwrap()
        });
        let mut stream = connect(&net.client, host.service(2)).unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).unwrap();
        assert_eq!(answer, "all");
        stream.write_all(b"thanks").unwrap();
        drop(stream);
        assert_eq!(heard.recv_timeout(PATIENCE).as_deref(), Ok("thanks"));
        until("no connection is left", || {
            let family = family.as_str();
            host.metric(&format!(
                "keelson_proxy_relayed_connections{{ip_family=\"{family}\",protocol=\"TCP\"}} 0"
            ))
        });
    }
}

#[test]
fn a_reset_goes_through() {
    let net = Net::new(1);
    let mut host = net.relays(Family::V4, everywhere);
    host.set(1, &[1]);
    let (go, gone) = mpsc::channel();
    let _served = once(&net, Family::V4, 1, move |stream| {
        gone.recv().unwrap();
        socket2::SockRef::from(&stream).set_linger(Some(Duration::ZERO)).unwrap();
    });
    let mut stream = connect(&net.client, host.service(1)).unwrap();
    go.send(()).unwrap();
    let end = stream.read(&mut [0]).map_err(|error| error.kind());
    assert_eq!(end, Err(ErrorKind::ConnectionReset));
}

#[test]
fn connections_outlive_their_endpoints_and_not_their_service() {
    for family in FAMILIES {
        let net = Net::new(2);
        let mut host = net.relays(family, everywhere);
        net.serve(family, 2);
        host.set(1, &[1]);
        let heard = once(&net, family, 1, |mut stream| {
            let mut said = [0; 5];
            stream.write_all(b"ready").unwrap();
            stream.read_exact(&mut said).unwrap();
            stream.write_all(&said).unwrap();
            stream.read(&mut said).map_err(|error| error.kind())
        });
        let mut stream = connect(&net.client, host.service(1)).unwrap();
        // The kernel takes connections by itself: this one has reached its endpoint.
        stream.read_exact(&mut [0; 5]).unwrap();
        // The endpoint is gone for new connections only, and then there is none at all.
        host.set(1, &[2]);
        assert_eq!(ask(&net.client, host.service(1)).unwrap(), 2);
        host.set(1, &[]);
        let refused = ask(&net.client, host.service(1)).map_err(|error| error.kind());
        assert_eq!(refused, Err(ErrorKind::ConnectionRefused));
        stream.write_all(b"still").unwrap();
        let mut answer = [0; 5];
        stream.read_exact(&mut answer).unwrap();
        assert_eq!(&answer, b"still");

        // The address isn't this node's any more: nobody waits for packets that can't come.
        host.replace(1, None);
        let end = stream.read(&mut answer).map_err(|error| error.kind());
        assert_eq!(end, Err(ErrorKind::ConnectionReset));
        assert_eq!(heard.recv_timeout(PATIENCE), Ok(Err(ErrorKind::ConnectionReset)));
    }
}

#[test]
fn an_endpoint_that_refuses_is_passed_over() {
    for family in FAMILIES {
        let net = Net::new(3);
        let mut host = net.relays(family, everywhere);
        // Nobody listens in the first two.
        net.serve(family, 3);
        host.set(1, &[1, 2, 3]);
        for _ in 0..20 {
            assert_eq!(ask(&net.client, host.service(1)).unwrap(), 3);
        }
        host.set(1, &[1, 2]);
        let none = ask(&net.client, host.service(1)).map_err(|error| error.kind());
        assert_eq!(none, Err(ErrorKind::ConnectionReset));
        let family = family.as_str();
        assert!(host.metric(&format!(
            "keelson_proxy_relay_refused_total{{ip_family=\"{family}\",reason=\"endpoint\"}} 1"
        )));
    }
}

#[test]
fn not_one_connection_fails_while_endpoints_roll() {
    let net = Net::new(3);
    let mut host = net.relays(Family::V4, everywhere);
    for n in 1..=3 {
        net.serve(Family::V4, n);
    }
    host.set(1, &[1]);
    let to = host.service(1);
    let (stop, stopped) = mpsc::channel::<()>();
    let (sent, counted) = mpsc::channel();
    net.client.run(move || {
        std::thread::spawn(move || {
            let mut connections = 0_u32;
            while stopped.try_recv() == Err(mpsc::TryRecvError::Empty) {
                let mut answer = [0];
                let mut stream = TcpStream::connect(to).unwrap();
                stream.read_exact(&mut answer).unwrap();
                connections += 1;
            }
            let _ = sent.send(connections);
        });
    });
    for round in 0..300_u16 {
        let kept = u8::try_from(round % 3).unwrap() + 1;
        host.set(1, &[kept]);
        host.set(1, &[kept, kept % 3 + 1]);
        if round % 50 == 0 {
            assert_eq!(host.synchronize().elements, 0);
        }
    }
    drop(stop);
    let connections = counted.recv_timeout(PATIENCE).expect("a connection failed");
    assert!(connections > 10, "{connections}");
}

#[test]
fn connections_are_bounded_and_their_places_come_free() {
    let net = Net::new(1);
    let mut host = net.relays(Family::V4, |settings| settings.limits.connections = 2);
    net.pods[0].run(|| {
        let listener = TcpListener::bind("0.0.0.0:8080").unwrap();
        std::thread::spawn(move || {
            for mut stream in listener.incoming().flatten() {
                std::thread::spawn(move || {
                    let _ = stream.write_all(&[1]);
                    let _ = stream.read(&mut [0]);
                });
            }
        });
    });
    host.set(1, &[1]);
    let open = || {
        let mut stream = connect(&net.client, host.service(1))?;
        stream.read_exact(&mut [0]).map(|()| stream)
    };
    let (first, _second) = (open().unwrap(), open().unwrap());
    assert_eq!(open().map_err(|error| error.kind()).err(), Some(ErrorKind::ConnectionReset));
    let limit = "keelson_proxy_relay_refused_total{ip_family=\"IPv4\",reason=\"limit\"} 1";
    assert!(host.metric(limit));
    drop(first);
    until("a place is free again", || open().is_ok());
}

#[test]
fn strangers_are_closed_at_once() {
    let net = Net::new(1);
    let mut host = net.relays(Family::V4, everywhere);
    net.serve(Family::V4, 1);
    let Action::Forward { endpoints, masquerade, affinity, .. } = host.forward(&[1]) else {
        panic!()
    };
    let only = vec!["192.0.2.3/32".parse().unwrap()];
    let action = Action::Forward { endpoints, masquerade, affinity, sources: Some(only.into()) };
    host.set_action(1, action);
    let closed = ask(&net.client, host.service(1)).map_err(|error| error.kind());
    assert_eq!(closed, Err(ErrorKind::ConnectionReset));
    net.client.sh(
        "ip addr add 192.0.2.3/24 dev eth0; ip route replace default via 192.0.2.1 src 192.0.2.3",
    );
    assert_eq!(ask(&net.client, host.service(1)).unwrap(), 1);
    // An established connection is not looked at again, a new one is.
    host.set(1, &[1]);
    net.client.sh("ip route replace default via 192.0.2.1 src 192.0.2.2");
    assert_eq!(ask(&net.client, host.service(1)).unwrap(), 1);
}
