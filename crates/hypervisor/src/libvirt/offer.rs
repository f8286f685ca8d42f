//! What a host offers to machines that might come, and what it says of them.

use virt_sys as v;
use virtward_model::{CpuFit, Fit, HostOffer, Machine};

use super::error::{Attempt, Fault};
use super::ffi::{Conn, Kind, VirResult};
use crate::{ErrorKind, xml};

/// What the host offers.
pub(super) fn offer(conn: &Conn) -> Attempt<HostOffer> {
    let (cpus, memory_total_bytes) = conn.node()?;
    let links = conn.net_devices().ok().filter(|list| !list.is_empty());
    let links = links.map(|list| list.iter().filter_map(|xml| xml::net_device(xml).ok().flatten()).collect());
    Ok(HostOffer {
        name: conn.hostname()?,
        uuid: xml::host_uuid(&conn.capabilities()?)?,
        libvirt_version: conn.libvirt_version()?,
        qemu_version: conn.hypervisor_version().unwrap_or(0),
        cpus,
        memory_total_bytes,
        memory_available_bytes: conn.memory_available()?,
        networks: conn.networks().unwrap_or_default(),
        links,
    })
}

/// Whether such a machine can run here.
pub(super) fn fit(conn: &Conn, machine: &Machine, cpu: Option<&str>) -> Attempt<Fit> {
    let kind = kind(machine)?;
    if let Err(e) = conn.domain_capabilities(&kind) {
        return match Fault::from(e) {
            fault if fault.kind() == ErrorKind::Unreachable => Err(fault),
            fault => {
                Ok(Fit { machine: Some(fault.message().to_owned()), cpu: CpuFit::Unknown("no such machine".into()) })
            }
        };
    }
    let cpu = match cpu {
        None => CpuFit::Superset,
        Some(cpu) => judge(conn.cpu_compare(&kind, cpu))?,
    };
    Ok(Fit { machine: None, cpu })
}

fn judge(compared: VirResult<i32>) -> Attempt<CpuFit> {
    match compared {
        Ok(v::VIR_CPU_COMPARE_IDENTICAL) => Ok(CpuFit::Identical),
        Ok(v::VIR_CPU_COMPARE_SUPERSET) => Ok(CpuFit::Superset),
        Ok(_) => Ok(CpuFit::Lacking("the CPU".into())),
        Err(e) if e.code as u32 == v::VIR_ERR_CPU_INCOMPATIBLE => {
            let lacks = e.message.rsplit_once(": ").map_or(e.message.as_str(), |(_, rest)| rest);
            Ok(CpuFit::Lacking(lacks.to_owned()))
        }
        Err(e) => match Fault::from(e) {
            fault if fault.kind() == ErrorKind::Unreachable => Err(fault),
            fault => Ok(CpuFit::Unknown(fault.message().to_owned())),
        },
    }
}

/// The CPU with everything that the host can give.
pub(super) fn host_cpu(conn: &Conn, machine: &Machine) -> Attempt<String> {
    let capabilities = conn.domain_capabilities(&kind(machine)?)?;
    xml::host_model(&capabilities)?
        .ok_or_else(|| Fault::new(ErrorKind::Unsupported, "the host offers no CPU model of its own"))
}

/// The CPU that these have in common.
pub(super) fn baseline(conn: &Conn, machine: &Machine, cpus: &[String]) -> Attempt<String> {
    Ok(conn.cpu_baseline(&kind(machine)?, cpus)?)
}

fn kind(m: &Machine) -> VirResult<Kind> {
    Kind::new(m.emulator.as_deref(), &m.arch, &m.machine, &m.virt)
}
