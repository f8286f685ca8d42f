//! Steps in a wrong order, which only tests of this crate can ask for: they show that the right order is needed, and that
//! the tests of crashes would notice if somebody changed it. In every other build there is no wrong order.

/// A wrong order.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Disorder {
    /// The restore point is published before what it refers to is durable and indexed.
    PointFirst,
    /// An object gets its name, and is acknowledged, before its bytes are durable.
    NameBeforeBytes,
    /// An object is acknowledged before its name is durable.
    AnswerBeforeName,
}

/// Whether the calling thread was asked for a wrong order.
#[cfg(test)]
pub fn is(disorder: Disorder) -> bool {
    testing::ASKED.get() == Some(disorder)
}

/// Never.
#[cfg(not(test))]
pub const fn is(_: Disorder) -> bool {
    false
}

#[cfg(test)]
pub mod testing {
    use std::cell::Cell;

    use super::Disorder;

    thread_local! {
        pub static ASKED: Cell<Option<Disorder>> = const { Cell::new(None) };
    }

    /// Runs on this thread in a wrong order, or in the right one.
    pub fn with<T>(disorder: Option<Disorder>, act: impl FnOnce() -> T) -> T {
        struct Restore;
        impl Drop for Restore {
            fn drop(&mut self) {
                ASKED.set(None);
            }
        }
        ASKED.set(disorder);
        let _restore = Restore;
        act()
    }
}
