//! libvirt's thread-local last error, copied out; and the silencing of its default habit of printing to stderr.

use std::ffi::{c_int, c_void};
use std::sync::Once;

use super::copy_string;

/// A failed libvirt call in libvirt's own terms.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(in crate::libvirt) struct VirError {
    /// virErrorNumber.
    pub(in crate::libvirt) code: c_int,
    /// virErrorDomain: the part of libvirt that raised it.
    pub(in crate::libvirt) domain: c_int,
    /// The message, unchanged.
    pub(in crate::libvirt) message: String,
}

/// Result of a raw call.
pub(in crate::libvirt) type VirResult<T> = Result<T, VirError>;

impl VirError {
    /// The error of the call that just failed on this thread.
    pub(super) fn last() -> VirError {
        // SAFETY: takes no arguments; returns null or a pointer to this thread's error, valid until its next call.
        let error = unsafe { virt_sys::virGetLastError() };
        if error.is_null() {
            return VirError { code: 0, domain: 0, message: "libvirt reported a failure without a reason".into() };
        }
        // SAFETY: non-null, and no libvirt call is made on this thread while it is borrowed.
        let error = unsafe { &*error };
        VirError { code: error.code, domain: error.domain, message: copy_string(error.message) }
    }

    /// A refusal of our own, in libvirt's terms.
    pub(super) fn invalid_argument(message: &str) -> VirError {
        VirError { code: virt_sys::VIR_ERR_INVALID_ARG as c_int, domain: 0, message: message.into() }
    }
}

/// Receives what libvirt would print; the same error reaches the caller as a result.
unsafe extern "C" fn quiet(_user: *mut c_void, _error: virt_sys::virErrorPtr) {}

/// Keeps libvirt from printing errors to stderr, once per process.
pub(super) fn silence() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        // SAFETY: `quiet` has the signature asked for, ignores its arguments and lives for the whole process.
        unsafe { virt_sys::virSetErrorFunc(std::ptr::null_mut(), Some(quiet)) };
    });
}
