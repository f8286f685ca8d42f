//! Emptying a host, and taking it into service again, by the daemon.

use virtward_api::{DrainPlan, DrainRequest, Host, VmLeft};
use virtward_model::Bytes;

use super::DrainArgs;
use crate::{
    app::App,
    commands::job::escaped,
    daemon,
    exit::{Failure, Kind},
    out,
    render::{self, Table},
};

fn path(host: &str, verb: &str) -> String {
    format!("/api/v1/hosts/{}/{verb}", escaped(host))
}

/// The host that is meant: the one that was named, else that of the daemon.
fn named(hosts: &[Host], host: Option<&str>) -> Option<String> {
    let local = || hosts.iter().find(|host| host.is_local).map(|host| host.name.clone());
    host.map(str::to_owned).or_else(local)
}

/// Empties a host by the daemon.
pub async fn by_daemon(app: &App, args: &DrainArgs) -> Result<(), Failure> {
    let hosts = daemon::hosts(app).await.unwrap_or_default();
    let Some(host) = named(&hosts, args.host.as_deref()).filter(|_| !hosts.is_empty()) else {
        return Err(Failure::new(Kind::Usage, format!("no daemon looks after {}", app.settings.connect))
            .hint("start it, or name the hosts that VMs may go to: virtward host drain --to h2 --to h3"));
    };
    if args.rules.is_some() || !args.how.is_unsaid() {
        let text = "the daemon takes rules and how VMs move from [moves] of its configuration";
        return Err(Failure::new(Kind::Usage, text).hint("name the hosts with --to for a drain without the daemon"));
    }
    let request = DrainRequest {
        parallel: Some(args.parallel),
        first: args.first.clone(),
        within_s: args.within.map(|time| time.unsigned_abs().as_secs()),
        with_inactive: args.with_inactive,
        force: args.force,
        dry_run: args.dry_run,
    };
    if args.dry_run {
        let plan: DrainPlan = daemon::client(app).post(&path(&host, "drain"), &request, None).await?;
        return planned(app, &plan);
    }
    let job = daemon::done(app, &path(&host, "drain"), &request, &host).await?;
    let left_behind = job.result.as_ref().map(|result| result.left.clone()).unwrap_or_default();
    if !app.json {
        out::text(&left(&left_behind))?;
    }
    match daemon::tell(app, &job, |_| render::printable(&format!("no VM runs on {host} any more")) + "\n") {
        Err(failure) if !left_behind.is_empty() => Err(Failure { kind: Kind::Partial, ..failure }
            .hint("each is named above with what can be done; virtward host resume takes the host into service again")),
        told => told,
    }
}

fn planned(app: &App, plan: &DrainPlan) -> Result<(), Failure> {
    if app.json {
        out::json(plan)?;
    } else {
        let mut table = Table::new(&["VM", "MEMORY", "FROM", "TO", "AFTER", "WHY"]);
        for of in &plan.moves {
            table.row([
                of.vm.name.clone(),
                Bytes(of.memory_bytes).to_string(),
                of.from.clone(),
                of.to.clone(),
                of.after.join(" "),
                of.why.clone(),
            ]);
        }
        let mut text = table.render(out::stdout_is_terminal());
        plan.warnings.iter().for_each(|warning| text += &(render::printable(&format!("note: {warning}")) + "\n"));
        out::text(&(text + &left(&plan.left)))?;
    }
    match plan.left.len() {
        0 => Ok(()),
        left => Err(Failure::new(Kind::Refused, format!("{left} VMs could not leave")).reported()),
    }
}

/// VMs that stay, with why and what can be done.
pub fn left(left: &[VmLeft]) -> String {
    let mut text = String::new();
    for left in left {
        text += &(render::printable(&format!("{} stays:", left.vm.name)) + "\n");
        left.reasons.iter().for_each(|reason| text += &(render::printable(&format!("  {reason}")) + "\n"));
        left.choices.iter().for_each(|choice| text += &(render::printable(&format!("  → {choice}")) + "\n"));
    }
    text
}

/// Takes a host into service by the daemon; its name and whether it was drained. None if that is not the daemon's to do.
pub async fn resume_by_daemon(app: &App, host: Option<&str>) -> Result<Option<(String, bool)>, Failure> {
    let hosts = daemon::hosts(app).await.unwrap_or_default();
    let Some(name) = named(&hosts, host) else {
        return match host {
            None => Ok(None),
            Some(_) => Err(Failure::new(Kind::Usage, format!("no daemon looks after {}", app.settings.connect))
                .hint("name the host with --connect")),
        };
    };
    let is_drained = hosts.iter().any(|of| of.name == name && of.drained.is_some());
    if host.is_none() && !is_drained {
        return Ok(None);
    }
    let resumed: Host = daemon::client(app).post(&path(&name, "resume"), &serde_json::Value::Null, None).await?;
    Ok(Some((resumed.name, is_drained)))
}
