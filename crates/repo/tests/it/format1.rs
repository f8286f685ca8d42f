//! Repositories written by the first release restore for ever.
