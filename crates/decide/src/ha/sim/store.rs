//! A store with revisions and transactions, and its history for a restore.

use std::{collections::BTreeMap, rc::Rc};

use crate::ha::{
    record::View,
    txn::{Answer, Change, Expect, Txn},
};

#[derive(Clone, Default)]
pub(super) struct Kv {
    entries: BTreeMap<String, (String, u64)>,
    revision: u64,
    view: Option<Rc<View>>,
}

impl Kv {
    pub(super) fn view(&mut self) -> Rc<View> {
        if let Some(view) = &self.view {
            return Rc::clone(view);
        }
        let mut view = View { revision: self.revision, ..View::default() };
        for (key, (value, revision)) in &self.entries {
            view.insert(key, value.as_bytes(), *revision);
        }
        assert!(view.unreadable.is_empty(), "{:?}", view.unreadable);
        let view = Rc::new(view);
        self.view = Some(Rc::clone(&view));
        view
    }

    pub(super) fn txn(&mut self, txn: &Txn) -> Answer {
        let holds = txn.expects.iter().all(|expect| match expect {
            Expect::At { key, revision } => self.entries.get(key).is_some_and(|(_, at)| at == revision),
            Expect::Absent { key } => !self.entries.contains_key(key),
        });
        if !holds {
            return Answer::Refused;
        }
        self.revision += 1;
        let mut view = self.view.take().map_or_else(View::default, Rc::unwrap_or_clone);
        let whole = view.revision + 1 == self.revision;
        for change in &txn.changes {
            match change {
                Change::Put { key, value } => {
                    self.entries.insert(key.clone(), (value.clone(), self.revision));
                    view.insert(key, value.as_bytes(), self.revision);
                }
                Change::Delete { .. } => unreachable!("no machine deletes"),
            }
        }
        assert!(view.unreadable.is_empty(), "{:?}", view.unreadable);
        view.revision = self.revision;
        self.view = whole.then(|| Rc::new(view));
        Answer::Done { revision: self.revision }
    }

    /// What a restore from a backup makes of it: the store's revision was never used before; those of what is in it are as
    /// they were, or, if it was written into a store that is in use, new.
    pub(super) fn restore(&mut self, backup: &Kv, anew: bool) {
        let revision = self.revision + 1_000;
        let mut entries = backup.entries.clone();
        if anew {
            entries.values_mut().for_each(|(_, of)| *of = revision);
        }
        *self = Kv { entries, revision, view: None };
    }
}
