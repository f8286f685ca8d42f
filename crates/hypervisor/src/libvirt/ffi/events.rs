//! The process-wide event loop thread, and the trampolines from libvirt's callbacks to a [`Sink`].
//!
//! The loop belongs to the process, not to a connection: libvirt allows one implementation per process, and it also
//! frees what closed connections leave behind, so it runs until the process ends. Callbacks run on that thread and must
//! never block or call libvirt.

use std::collections::BTreeMap;
use std::ffi::{c_char, c_int, c_uint, c_void};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

use uuid::Uuid;

use super::{VirError, VirResult, check, copy_string};

/// A domain event in libvirt's numbers.
#[derive(Clone, Debug)]
pub(in crate::libvirt) enum RawEvent {
    Lifecycle { event: c_uint, detail: c_uint },
    Rebooted,
    Watchdog,
    IoError { alias: String },
    Agent { connected: bool },
    BlockJob { target: String, status: c_uint },
    JobCompleted,
    MigrationPass { iteration: c_int },
}

/// Takes what the event loop thread sees. Implementations return at once.
pub(in crate::libvirt) trait Sink: Send + Sync {
    /// Something happened to a domain.
    fn domain(&self, uuid: Uuid, name: String, event: RawEvent);
    /// The connection ended without being closed by us; the reason in words.
    fn closed(&self, reason: &'static str);
}

/// What the callbacks get as their opaque pointer.
type Opaque = Arc<dyn Sink>;

/// Starts the event loop thread, once per process.
pub(super) fn ensure_loop() -> VirResult<()> {
    static STARTED: OnceLock<VirResult<()>> = OnceLock::new();
    STARTED.get_or_init(start_loop).clone()
}

fn start_loop() -> VirResult<()> {
    // SAFETY: no arguments; called once, before any connection is opened.
    check(unsafe { virt_sys::virEventRegisterDefaultImpl() })?;
    let thread = std::thread::Builder::new().name("libvirt-events".into());
    let spawned = thread.spawn(|| {
        loop {
            // SAFETY: the default implementation is registered, and only this thread runs it.
            if unsafe { virt_sys::virEventRunDefaultImpl() } < 0 {
                tracing::warn!(error = %VirError::last().message, "libvirt event loop iteration failed");
                std::thread::sleep(std::time::Duration::from_millis(200));
            }
        }
    });
    match spawned {
        Ok(_) => Ok(()),
        Err(e) => Err(VirError::invalid_argument(&format!("cannot start the libvirt event thread: {e}"))),
    }
}

/// The callbacks registered on one connection.
pub(super) struct Registration {
    ids: Vec<c_int>,
    ticket: usize,
    close_callback: bool,
}

impl Registration {
    /// Registers every event we know with `sink`. A driver without events or close notification gets what it has.
    ///
    /// # Safety
    /// `conn` must be an open connection, and [`Registration::remove`] be called on it before it is closed.
    pub(super) unsafe fn add(conn: virt_sys::virConnectPtr, sink: &Opaque) -> Registration {
        let mut ids = Vec::new();
        for (event, callback) in callbacks() {
            let opaque = boxed(sink);
            // SAFETY: `conn` is open (caller); the callback has the signature that `event` asks for; the opaque box is
            // released by `release`, which libvirt calls when the registration ends.
            let id = unsafe {
                virt_sys::virConnectDomainEventRegisterAny(
                    conn,
                    std::ptr::null_mut(),
                    event as c_int,
                    callback,
                    opaque,
                    Some(release),
                )
            };
            match check(id) {
                Ok(id) => ids.push(id),
                Err(e) => {
                    tracing::debug!(event, error = %e.message, "libvirt does not offer this event");
                    // SAFETY: a registration that failed leaves the box to the caller.
                    unsafe { release(opaque) };
                }
            }
        }
        let ticket = listen(sink);
        // SAFETY: as above; `on_close` has the signature of virConnectCloseFunc and takes the ticket for what it is: a
        // number, not a pointer. Nothing needs to be freed.
        let rc =
            unsafe { virt_sys::virConnectRegisterCloseCallback(conn, Some(on_close), ticket as *mut c_void, None) };
        Registration { ids, ticket, close_callback: rc == 0 }
    }

    /// Ends all registrations.
    ///
    /// # Safety
    /// `conn` must be the connection given to [`Registration::add`], not closed yet.
    pub(super) unsafe fn remove(&mut self, conn: virt_sys::virConnectPtr) {
        for id in self.ids.drain(..) {
            // SAFETY: `id` was returned for this connection. On a dead one the remote part fails, the local part works.
            unsafe { virt_sys::virConnectDomainEventDeregisterAny(conn, id) };
        }
        if std::mem::take(&mut self.close_callback) {
            // SAFETY: `on_close` was registered on this connection.
            unsafe { virt_sys::virConnectUnregisterCloseCallback(conn, Some(on_close)) };
        }
        listeners().sinks.remove(&self.ticket);
    }
}

/// Who hears of closed connections, by ticket. Drivers without close notification accept the callback, but never free
/// what comes with it; a number needs no freeing, and one that is late finds nobody.
struct Listeners {
    last: usize,
    sinks: BTreeMap<usize, Opaque>,
}

fn listeners() -> MutexGuard<'static, Listeners> {
    static LISTENERS: Mutex<Listeners> = Mutex::new(Listeners { last: 0, sinks: BTreeMap::new() });
    LISTENERS.lock().unwrap_or_else(PoisonError::into_inner)
}

fn listen(sink: &Opaque) -> usize {
    let mut listeners = listeners();
    listeners.last += 1;
    let ticket = listeners.last;
    listeners.sinks.insert(ticket, Arc::clone(sink));
    ticket
}

fn boxed(sink: &Opaque) -> *mut c_void {
    Box::into_raw(Box::new(Arc::clone(sink))).cast()
}

/// Releases one opaque box.
unsafe extern "C" fn release(opaque: *mut c_void) {
    // SAFETY: `opaque` came from `boxed`, and libvirt calls this once per registration.
    drop(unsafe { Box::from_raw(opaque.cast::<Opaque>()) });
}

/// Each event with its trampoline, cast to the generic type that registration wants.
fn callbacks() -> [(c_uint, virt_sys::virConnectDomainEventGenericCallback); 8] {
    /// Casts a callback to the generic signature.
    macro_rules! generic {
        ($f:expr, $ty:ty) => {{
            let callback: $ty = Some($f);
            // SAFETY: libvirt defines registration through this cast and calls the function with the signature that
            // belongs to the event id; both sides are optional extern "C" function pointers of one size.
            unsafe { std::mem::transmute::<$ty, virt_sys::virConnectDomainEventGenericCallback>(callback) }
        }};
    }
    use virt_sys as v;
    [
        (v::VIR_DOMAIN_EVENT_ID_LIFECYCLE, generic!(on_lifecycle, v::virConnectDomainEventCallback)),
        (v::VIR_DOMAIN_EVENT_ID_REBOOT, Some(on_reboot)),
        (v::VIR_DOMAIN_EVENT_ID_WATCHDOG, generic!(on_watchdog, v::virConnectDomainEventWatchdogCallback)),
        (v::VIR_DOMAIN_EVENT_ID_IO_ERROR, generic!(on_io_error, v::virConnectDomainEventIOErrorCallback)),
        (v::VIR_DOMAIN_EVENT_ID_AGENT_LIFECYCLE, generic!(on_agent, v::virConnectDomainEventAgentLifecycleCallback)),
        (v::VIR_DOMAIN_EVENT_ID_BLOCK_JOB_2, generic!(on_block_job, v::virConnectDomainEventBlockJobCallback)),
        (v::VIR_DOMAIN_EVENT_ID_JOB_COMPLETED, generic!(on_job, v::virConnectDomainEventJobCompletedCallback)),
        (
            v::VIR_DOMAIN_EVENT_ID_MIGRATION_ITERATION,
            generic!(on_migration_pass, v::virConnectDomainEventMigrationIterationCallback),
        ),
    ]
}

/// Identifies the domain and hands the event over.
///
/// # Safety
/// `opaque` must come from `boxed` and be registered still, `dom` be valid for this call: libvirt's promise to callbacks.
unsafe fn deliver(dom: virt_sys::virDomainPtr, opaque: *mut c_void, event: RawEvent) {
    let mut uuid = [0u8; 16];
    // SAFETY: `dom` is valid (caller), and the buffer has VIR_UUID_BUFLEN bytes. Purely local.
    if unsafe { virt_sys::virDomainGetUUID(dom, uuid.as_mut_ptr()) } < 0 {
        return;
    }
    // SAFETY: `dom` is valid; the name is owned by it and copied. Purely local.
    let name = copy_string(unsafe { virt_sys::virDomainGetName(dom) });
    // SAFETY: `opaque` points to a live box (caller).
    unsafe { &*opaque.cast::<Opaque>() }.domain(Uuid::from_bytes(uuid), name, event);
}

unsafe extern "C" fn on_lifecycle(
    _conn: virt_sys::virConnectPtr,
    dom: virt_sys::virDomainPtr,
    event: c_int,
    detail: c_int,
    opaque: *mut c_void,
) -> c_int {
    // SAFETY: libvirt's promise to callbacks.
    unsafe { deliver(dom, opaque, RawEvent::Lifecycle { event: event as c_uint, detail: detail as c_uint }) };
    0
}

unsafe extern "C" fn on_reboot(_c: virt_sys::virConnectPtr, dom: virt_sys::virDomainPtr, opaque: *mut c_void) {
    // SAFETY: libvirt's promise to callbacks.
    unsafe { deliver(dom, opaque, RawEvent::Rebooted) };
}

unsafe extern "C" fn on_watchdog(
    _conn: virt_sys::virConnectPtr,
    dom: virt_sys::virDomainPtr,
    _action: c_int,
    opaque: *mut c_void,
) {
    // SAFETY: libvirt's promise to callbacks.
    unsafe { deliver(dom, opaque, RawEvent::Watchdog) };
}

unsafe extern "C" fn on_io_error(
    _conn: virt_sys::virConnectPtr,
    dom: virt_sys::virDomainPtr,
    _path: *const c_char,
    alias: *const c_char,
    _action: c_int,
    opaque: *mut c_void,
) {
    let alias = copy_string(alias);
    // SAFETY: libvirt's promise to callbacks.
    unsafe { deliver(dom, opaque, RawEvent::IoError { alias }) };
}

unsafe extern "C" fn on_agent(
    _conn: virt_sys::virConnectPtr,
    dom: virt_sys::virDomainPtr,
    state: c_int,
    _reason: c_int,
    opaque: *mut c_void,
) {
    let connected = state as c_uint == virt_sys::VIR_CONNECT_DOMAIN_EVENT_AGENT_LIFECYCLE_STATE_CONNECTED;
    // SAFETY: libvirt's promise to callbacks.
    unsafe { deliver(dom, opaque, RawEvent::Agent { connected }) };
}

unsafe extern "C" fn on_block_job(
    _conn: virt_sys::virConnectPtr,
    dom: virt_sys::virDomainPtr,
    target: *const c_char,
    _kind: c_int,
    status: c_int,
    opaque: *mut c_void,
) {
    let target = copy_string(target);
    // SAFETY: libvirt's promise to callbacks.
    unsafe { deliver(dom, opaque, RawEvent::BlockJob { target, status: status as c_uint }) };
}

unsafe extern "C" fn on_job(
    _conn: virt_sys::virConnectPtr,
    dom: virt_sys::virDomainPtr,
    _params: virt_sys::virTypedParameterPtr,
    _count: c_int,
    opaque: *mut c_void,
) {
    // SAFETY: libvirt's promise to callbacks.
    unsafe { deliver(dom, opaque, RawEvent::JobCompleted) };
}

unsafe extern "C" fn on_migration_pass(
    _conn: virt_sys::virConnectPtr,
    dom: virt_sys::virDomainPtr,
    iteration: c_int,
    opaque: *mut c_void,
) {
    // SAFETY: libvirt's promise to callbacks.
    unsafe { deliver(dom, opaque, RawEvent::MigrationPass { iteration }) };
}

unsafe extern "C" fn on_close(_conn: virt_sys::virConnectPtr, reason: c_int, opaque: *mut c_void) {
    let reason = match reason as c_uint {
        virt_sys::VIR_CONNECT_CLOSE_REASON_EOF => "the daemon closed the connection",
        virt_sys::VIR_CONNECT_CLOSE_REASON_KEEPALIVE => "the daemon stopped answering",
        virt_sys::VIR_CONNECT_CLOSE_REASON_CLIENT => "the connection was closed here",
        _ => "the connection broke",
    };
    let sink = listeners().sinks.get(&(opaque as usize)).cloned();
    if let Some(sink) = sink {
        sink.closed(reason);
    }
}
