//! Keeps account of writes that were acknowledged but not flushed: if a connection is lost, they may be, too.

use std::sync::Mutex;

/// Account of one client, over all its connections.
#[derive(Debug, Default)]
pub(crate) struct Durability(Mutex<Account>);

#[derive(Debug, Default)]
struct Account {
    unflushed: u64,
    lost: u64,
    /// Counts losses, so that a flush that began before one cannot vouch for what came after.
    losses: u64,
}

/// State of the account when a flush began.
#[derive(Debug)]
pub(crate) struct FlushMark {
    unflushed: u64,
    losses: u64,
}

impl Durability {
    fn account(&self) -> std::sync::MutexGuard<'_, Account> {
        // The account is numbers only and consistent at every step, so a panic elsewhere does not spoil it.
        self.0.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }

    /// The server acknowledged a write.
    pub(crate) fn acknowledged(&self, bytes: u64) {
        let mut account = self.account();
        account.unflushed = account.unflushed.saturating_add(bytes);
    }

    /// A connection broke: the server may have died with what it had not flushed.
    pub(crate) fn connection_lost(&self) {
        let mut account = self.account();
        if account.unflushed > 0 {
            account.lost = account.lost.saturating_add(account.unflushed);
            account.unflushed = 0;
            account.losses += 1;
        }
    }

    /// A flush is about to be sent.
    pub(crate) fn flush_begins(&self) -> FlushMark {
        let account = self.account();
        FlushMark { unflushed: account.unflushed, losses: account.losses }
    }

    /// The server flushed. `Err` tells how many bytes are in doubt; it is told once.
    pub(crate) fn flushed(&self, mark: &FlushMark) -> Result<(), u64> {
        let mut account = self.account();
        if account.losses == mark.losses {
            account.unflushed = account.unflushed.saturating_sub(mark.unflushed);
        }
        match std::mem::take(&mut account.lost) {
            0 => Ok(()),
            lost => Err(lost),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn flushed_writes_survive_a_lost_connection() {
        let account = Durability::default();
        account.acknowledged(10);
        let mark = account.flush_begins();
        assert_eq!(account.flushed(&mark), Ok(()));
        account.connection_lost();
        assert_eq!(account.flushed(&account.flush_begins()), Ok(()));
    }

    #[test]
    fn unflushed_writes_are_reported_once() {
        let account = Durability::default();
        account.acknowledged(10);
        account.connection_lost();
        account.acknowledged(5);
        assert_eq!(account.flushed(&account.flush_begins()), Err(10));
        assert_eq!(account.flushed(&account.flush_begins()), Ok(()));
    }

    #[test]
    fn a_loss_during_a_flush_is_reported_by_it() {
        let account = Durability::default();
        account.acknowledged(10);
        let mark = account.flush_begins();
        account.connection_lost();
        account.acknowledged(3);
        assert_eq!(account.flushed(&mark), Err(10));
        account.connection_lost();
        assert_eq!(account.flushed(&account.flush_begins()), Err(3));
    }
}
