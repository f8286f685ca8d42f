//! What every store promises, as one suite.

use std::sync::atomic::{AtomicU32, Ordering::SeqCst};

use virtward_repo::{Error, Store, store::Put};

/// Everything that one caller can see.
pub fn contract(store: &dyn Store) {
    assert!(!store.exists("data/00/a").unwrap());
    assert!(matches!(store.size("data/00/a"), Err(Error::Missing { .. })));
    assert!(matches!(store.get("data/00/a", 10), Err(Error::Missing { .. })));
    assert_eq!(store.put_if_absent("data/00/a", b"hello").unwrap(), Put::Created);
    assert_eq!(store.put_if_absent("data/00/a", b"other").unwrap(), Put::Exists);
    assert_eq!(store.get("data/00/a", 5).unwrap(), b"hello");
    assert!(matches!(store.get("data/00/a", 4), Err(Error::Damaged { .. })));
    assert_eq!(store.get_range("data/00/a", 1, 3).unwrap(), b"ell");
    assert!(matches!(store.get_range("data/00/a", 3, 3), Err(Error::Damaged { .. })));
    assert!(store.get_range("data/00/a", u64::MAX, 3).is_err());

    let mut writer = store.create("data/01/b").unwrap();
    writer.write(b"by ").unwrap();
    writer.write(b"parts").unwrap();
    assert!(!store.exists("data/01/b").unwrap(), "nothing appears before the end");
    assert_eq!(writer.finish().unwrap(), Put::Created);
    let mut late = store.create("data/01/b").unwrap();
    late.write(b"too late").unwrap();
    assert_eq!(late.finish().unwrap(), Put::Exists);
    assert_eq!(store.get("data/01/b", 100).unwrap(), b"by parts");
    let mut dropped = store.create("data/02/c").unwrap();
    dropped.write(b"never").unwrap();
    drop(dropped);

    let listed = |prefix: &str| {
        let mut names = Vec::new();
        store
            .list(prefix, &mut |object| {
                names.push((object.name, object.bytes));
                Ok(())
            })
            .unwrap();
        names.sort();
        names
    };
    let both = vec![("data/00/a".to_owned(), 5), ("data/01/b".to_owned(), 8)];
    assert_eq!((listed(""), listed("data/"), listed("none/")), (both.clone(), both, vec![]));
    assert!(store.delete("data/00/a").unwrap());
    assert!(!store.delete("data/00/a").unwrap());
    for bad in ["", "/x", "../x", "a/../b", "A", "a//b", "a\0", ".hidden"] {
        assert!(store.put_if_absent(bad, b"").is_err(), "{bad:?}");
    }
}

/// Of several writers of one name one wins, and what is there is what it wrote.
pub fn racing_puts_have_one_winner(store: &dyn Store) {
    let created = AtomicU32::new(0);
    std::thread::scope(|scope| {
        for n in 0..8u8 {
            let created = &created;
            scope.spawn(move || {
                if store.put_if_absent("points/x", &[n; 9000]).unwrap() == Put::Created {
                    created.fetch_add(1, SeqCst);
                }
            });
        }
    });
    assert_eq!(created.into_inner(), 1);
    let bytes = store.get("points/x", 9000).unwrap();
    assert!(bytes.iter().all(|b| *b == bytes[0]));
}
