//! `virtward status`: what the daemon of this host knows, at a glance.

use virtward_api::{Overview, Settings, Version};
use virtward_model::Bytes;

use crate::{app::App, daemon, exit::Failure, out, render};

/// Arguments of `status`.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Asks the daemon over its socket; for root.

Examples:
  virtward status
  virtward status --json | jq .protection")]
pub struct Args {}

/// Shows it.
pub async fn run(app: &App) -> Result<(), Failure> {
    let client = daemon::client(app);
    let overview: Overview = client.get("/api/v1/overview").await?;
    if app.json {
        return out::json(&overview);
    }
    let version: Version = client.get("/api/v1/version").await?;
    let settings: Settings = client.get("/api/v1/settings").await?;
    out::text(&text(&overview, &version, &settings))
}

fn text(overview: &Overview, version: &Version, settings: &Settings) -> String {
    let (vms, jobs, protection) = (&overview.vms, &overview.jobs, &overview.protection);
    let host = match (overview.hosts.up, overview.hosts.libvirtd_down, overview.hosts.down) {
        (1.., ..) => "up",
        (_, 1.., _) => "libvirtd down",
        (.., 1..) => "down",
        _ => "unknown",
    };
    let mut fields = vec![
        ("daemon", format!("{} {}, since {}", version.product, version.version, render::local_time(version.started))),
        ("https", settings.listen.as_ref().map_or_else(|| "off".to_owned(), |at| format!("https://{at}"))),
        ("host", format!("{} ({host})", version.host)),
        ("VMs", format!("{}, {} running", vms.total, vms.running)),
        ("protected", protection.protected.to_string()),
    ];
    for (name, count) in [
        ("overdue", protection.overdue),
        ("pending", protection.pending),
        ("unprotected", protection.unprotected),
        ("unknown", protection.unknown),
    ] {
        if count > 0 {
            fields.push((name, count.to_string()));
        }
    }
    fields.push(("jobs", format!("{} running, {} queued", jobs.running, jobs.queued)));
    fields.push(("last 24 h", format!("{} succeeded, {} failed", jobs.succeeded, jobs.failed)));
    for one in &overview.capacity {
        let size = one.bytes.map_or_else(|| "not measured".to_owned(), |bytes| Bytes(bytes).to_string());
        let free = one.free_bytes.map(|free| format!(", {} free", Bytes(free))).unwrap_or_default();
        let state = if one.is_ok { "" } else { ", cannot be used" };
        fields.push(("repository", format!("{}: {size}{free}{state}", one.repository)));
    }
    for job in overview.failures.iter().take(5) {
        let vm = job.vm.as_ref().map_or(job.repository.as_str(), |vm| vm.name.as_str());
        let why = job.error.as_ref().map_or("", |error| error.message.as_str());
        let at = job.finished.map(render::local_time).unwrap_or_default();
        fields.push(("failure", format!("{at} {} of {vm}: {why}", render::word(&job.kind))));
    }
    render::fields(&fields)
}
