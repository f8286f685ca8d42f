//! Somebody holds the credentials of a host that backs up. What the documented policy of these credentials forbids is
//! enforced here by a gate in front of a real server, request by request; the backups go through the same gate.

use std::sync::Arc;

use virtward_repo::{
    Error, Repository, Store,
    store::{Put, append::AppendOnly, mem::MemStore},
};

use crate::{
    common::*,
    http::{Asked, Http, Reply},
    server::{BUCKET, Server, names, store_at},
};

/// The policy of docs/object-storage.md for a host that backs up: it may list, read, and create objects that do not
/// exist; it may delete nothing but beats of leases.
fn policy(asked: &Asked) -> Reply {
    let denied = || Reply::error(403, "AccessDenied");
    let query = asked.query();
    let creates = asked.header("if-none-match") == Some("*");
    match &*asked.method {
        "GET" | "HEAD" => Reply::Forward,
        // Parts and beginnings of uploads create nothing; their completion does.
        "PUT" if query.contains("partNumber=") && query.contains("uploadId=") => Reply::Forward,
        "POST" if query == "uploads=" => Reply::Forward,
        "PUT" if query.is_empty() && creates => Reply::Forward,
        "POST" if query.starts_with("uploadId=") && creates => Reply::Forward,
        "DELETE" if query.starts_with("uploadId=") => Reply::Forward,
        "DELETE" if asked.path().starts_with(&format!("/{BUCKET}/a/leases/")) => Reply::Forward,
        _ => denied(),
    }
}

#[test]
fn who_holds_the_writers_credentials_can_neither_delete_nor_overwrite() {
    let server = Server::start();
    init(server.store("a"));
    let gate = Http::start(server.port, policy);
    let host = Repository::open(store_at(&gate.endpoint(), "a"), &secret()).unwrap();
    let mut image = noise(1, 12 * CHUNK as usize);
    let before = back_up(&host, "web1", &image).unwrap();
    image[0] ^= 1;
    let after = back_up_on(&host, "web1", &image, Some(&before.disks[0]), &|index| index == 0).unwrap();

    // The attacker uses the credentials and the keys, and no courtesy of this program.
    let stolen = store_at(&gate.endpoint(), "a");
    let victims = names(&*stolen);
    assert!(victims.iter().any(|name| name.starts_with("data/")) && victims.contains(&"config".to_owned()));
    for name in &victims {
        let denied = stolen.delete(name).unwrap_err();
        assert!(matches!(denied, Error::Remote { is_denied: true, .. }), "{name}: {denied}");
        assert_eq!(stolen.put_if_absent(name, b"ransom").unwrap(), Put::Exists, "{name}");
        assert_eq!(overwrite(&gate, name), 403, "{name}");
    }
    let denied = host.delete_point(before.id).unwrap_err();
    assert!(matches!(denied, Error::Remote { is_denied: true, .. }), "{denied}");

    let owner = Repository::open(server.store("a"), &secret()).unwrap();
    assert_eq!(owner.points().unwrap().points.len(), 2);
    assert!(restore(&owner, &after.disks[0]).unwrap() == image);
    image[0] ^= 1;
    assert!(restore(&owner, &before.disks[0]).unwrap() == image);
    assert!(owner.verify(&Default::default(), &()).unwrap().is_ok());
}

/// A write without the condition, with a signature that the server accepts.
fn overwrite(gate: &Http, name: &str) -> u16 {
    use std::io::{Read, Write};
    let authority = gate.endpoint().trim_start_matches("http://").to_owned();
    let mut stream = std::net::TcpStream::connect(&authority).unwrap();
    // The gate decides before anybody looks at the signature.
    let head = format!(
        "PUT /{BUCKET}/a/{name} HTTP/1.1\r\nhost: {authority}\r\ncontent-length: 6\r\nconnection: close\r\n\r\nransom"
    );
    stream.write_all(head.as_bytes()).unwrap();
    let mut answer = [0; 12];
    stream.read_exact(&mut answer).unwrap();
    std::str::from_utf8(&answer[9..]).unwrap().parse().unwrap()
}

#[test]
fn the_guard_lets_backups_through_and_deletions_not() {
    let objects = MemStore::new();
    init(Arc::new(objects.clone()));
    let host = Repository::open(Arc::new(AppendOnly::new(Arc::new(objects.clone()))), &secret()).unwrap();
    let image = noise(2, 4 * CHUNK as usize);
    let saved = back_up(&host, "web1", &image).unwrap();
    assert!(!objects.names().iter().any(|name| name.starts_with("leases/")), "a run takes back its own beats");
    let reopened = Repository::open(Arc::new(AppendOnly::new(Arc::new(objects.clone()))), &secret()).unwrap();
    let before = objects.names();
    for name in &before {
        let refused = reopened.store().delete(name).unwrap_err();
        assert!(matches!(refused, Error::AppendOnly { .. }), "{name}: {refused}");
        assert_eq!(reopened.store().put_if_absent(name, b"x").unwrap(), Put::Exists);
    }
    assert!(matches!(reopened.delete_point(saved.id), Err(Error::AppendOnly { .. })));
    assert!(restore(&reopened, &saved.disks[0]).unwrap() == image);
    let lease = "leases/00000000000000000000000000000000.00000000";
    let _ = objects.put_if_absent(lease, b"somebody else's").unwrap();
    assert!(reopened.store().delete(lease).is_err(), "not this run's");
}
