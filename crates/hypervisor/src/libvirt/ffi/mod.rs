//! The safe layer over libvirt's C interface, and the only place of the project with `unsafe` code.
//!
//! Every pointer is owned by a type that gives it back on drop, every string is copied out at once, every failed call
//! carries libvirt's own code, domain and message. All of it blocks: callers are threads made for that. Not here:
//! what an error means to a caller (`super::error`), reconnection, timeouts.
#![allow(unsafe_code)]

mod conn;
mod domain;
mod error;
mod events;
mod host;
mod params;
mod storage;

pub(super) use conn::Conn;
pub(super) use domain::Domain;
pub(super) use error::{VirError, VirResult};
pub(super) use events::{RawEvent, Sink};
pub(super) use host::Kind;
pub(super) use params::{Params, ParamsBuilder};
pub(super) use storage::StoragePool;

use std::ffi::{CStr, CString, c_char, c_int};

/// Copies a string that libvirt allocated and frees it; a null pointer is the error of the call that returned it.
fn take_string(ptr: *mut c_char) -> VirResult<String> {
    if ptr.is_null() {
        return Err(VirError::last());
    }
    // SAFETY: non-null strings returned by libvirt are NUL-terminated, and the caller hands over ownership.
    let text = unsafe { CStr::from_ptr(ptr) }.to_string_lossy().into_owned();
    // SAFETY: libvirt allocates with malloc and documents free() for its returned strings; `ptr` is not used again.
    unsafe { libc::free(ptr.cast()) };
    Ok(text)
}

/// Copies a string that stays libvirt's; null becomes the empty string.
fn copy_string(ptr: *const c_char) -> String {
    if ptr.is_null() {
        return String::new();
    }
    // SAFETY: libvirt passes NUL-terminated strings that live at least until the call or callback returns.
    unsafe { CStr::from_ptr(ptr) }.to_string_lossy().into_owned()
}

/// A C string; text with an embedded NUL is refused as an invalid argument.
fn c_string(text: &str) -> VirResult<CString> {
    CString::new(text).map_err(|_| VirError::invalid_argument("the text contains a NUL character"))
}

/// Ends the process at once, without the C library's exit handlers: libvirt's threads may still be taking down a
/// connection that broke, and its destructors must not pull the memory from under them.
pub fn exit_now(code: u8) -> ! {
    // SAFETY: ends the process; nothing of it is used afterwards. Callers have written out what they had buffered.
    unsafe { libc::_exit(c_int::from(code)) }
}

/// Turns libvirt's convention (negative is failure) into a result.
fn check(rc: c_int) -> VirResult<c_int> {
    if rc < 0 { Err(VirError::last()) } else { Ok(rc) }
}
