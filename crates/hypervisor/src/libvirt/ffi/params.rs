//! libvirt's typed parameters: an owned copy to read, a builder to pass.

use std::collections::HashMap;
use std::ffi::{c_int, c_uint};
use std::ptr;

use super::{VirResult, c_string, check, copy_string};

/// Parameters that a call returned, copied into safe memory.
#[derive(Clone, Debug, Default)]
pub(in crate::libvirt) struct Params(HashMap<String, Value>);

#[derive(Clone, Debug)]
enum Value {
    Signed(i64),
    Unsigned(u64),
    Text(String),
    Other,
}

impl Params {
    /// Copies `count` parameters.
    ///
    /// # Safety
    /// `array` must be null or point to `count` initialised typed parameters.
    pub(super) unsafe fn copy(array: virt_sys::virTypedParameterPtr, count: c_int) -> Params {
        let count = usize::try_from(count).unwrap_or(0);
        if array.is_null() || count == 0 {
            return Params::default();
        }
        // SAFETY: the caller vouches for pointer and count; the slice ends with this function.
        let slice = unsafe { std::slice::from_raw_parts(array, count) };
        Params(slice.iter().map(|p| (copy_string(p.field.as_ptr()), value(p))).collect())
    }

    /// A number that cannot be negative; absent, negative or of another type is none.
    pub(in crate::libvirt) fn u64(&self, name: &str) -> Option<u64> {
        match self.0.get(name)? {
            Value::Signed(n) => u64::try_from(*n).ok(),
            Value::Unsigned(n) => Some(*n),
            Value::Text(_) | Value::Other => None,
        }
    }

    /// A text.
    pub(in crate::libvirt) fn text(&self, name: &str) -> Option<&str> {
        match self.0.get(name)? {
            Value::Text(text) => Some(text),
            _ => None,
        }
    }
}

/// Copies the member of the union that the type tag names.
fn value(p: &virt_sys::virTypedParameter) -> Value {
    let v = &p.value;
    match p.type_ as c_uint {
        // SAFETY: the tag says that `i` is the initialised member.
        virt_sys::VIR_TYPED_PARAM_INT => Value::Signed(i64::from(unsafe { v.i })),
        // SAFETY: the tag says `ui`.
        virt_sys::VIR_TYPED_PARAM_UINT => Value::Unsigned(u64::from(unsafe { v.ui })),
        // SAFETY: the tag says `l`.
        virt_sys::VIR_TYPED_PARAM_LLONG => Value::Signed(unsafe { v.l }),
        // SAFETY: the tag says `ul`.
        virt_sys::VIR_TYPED_PARAM_ULLONG => Value::Unsigned(unsafe { v.ul }),
        // SAFETY: the tag says `b`, a char holding 0 or 1.
        virt_sys::VIR_TYPED_PARAM_BOOLEAN => Value::Unsigned(u64::from(unsafe { v.b } != 0)),
        // SAFETY: the tag says `s`, a NUL-terminated string owned by the array.
        virt_sys::VIR_TYPED_PARAM_STRING => Value::Text(copy_string(unsafe { v.s })),
        _ => Value::Other,
    }
}

/// Parameters to pass to a call; libvirt owns the strings inside until drop frees all of it.
pub(in crate::libvirt) struct ParamsBuilder {
    array: virt_sys::virTypedParameterPtr,
    count: c_int,
    capacity: c_int,
}

impl ParamsBuilder {
    /// No parameters.
    pub(in crate::libvirt) fn new() -> Self {
        Self { array: ptr::null_mut(), count: 0, capacity: 0 }
    }

    /// Adds a string.
    pub(in crate::libvirt) fn text(&mut self, name: &str, value: &str) -> VirResult<()> {
        let (name, value) = (c_string(name)?, c_string(value)?);
        // SAFETY: array, count and capacity describe memory that only these functions manage; strings are copied.
        check(unsafe {
            virt_sys::virTypedParamsAddString(
                &mut self.array,
                &mut self.count,
                &mut self.capacity,
                name.as_ptr(),
                value.as_ptr(),
            )
        })?;
        Ok(())
    }

    /// Adds an int.
    pub(in crate::libvirt) fn int(&mut self, name: &str, value: c_int) -> VirResult<()> {
        let name = c_string(name)?;
        // SAFETY: as in `text`.
        check(unsafe {
            virt_sys::virTypedParamsAddInt(&mut self.array, &mut self.count, &mut self.capacity, name.as_ptr(), value)
        })?;
        Ok(())
    }

    /// Adds an unsigned long long.
    pub(in crate::libvirt) fn u64(&mut self, name: &str, value: u64) -> VirResult<()> {
        let name = c_string(name)?;
        // SAFETY: as in `text`.
        check(unsafe {
            virt_sys::virTypedParamsAddULLong(
                &mut self.array,
                &mut self.count,
                &mut self.capacity,
                name.as_ptr(),
                value,
            )
        })?;
        Ok(())
    }

    /// Pointer and length for a call that only reads them.
    pub(super) fn as_raw(&self) -> (virt_sys::virTypedParameterPtr, c_int) {
        (self.array, self.count)
    }
}

impl Drop for ParamsBuilder {
    fn drop(&mut self) {
        // SAFETY: frees exactly what the Add functions allocated; null with 0 is allowed.
        unsafe { virt_sys::virTypedParamsFree(self.array, self.count) };
    }
}
