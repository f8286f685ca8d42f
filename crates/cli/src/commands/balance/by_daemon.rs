//! Balancing by the daemon: of its whole cluster.

use virtward_api::{BalanceHost, BalanceMode, BalanceRequest, BalanceRound, BalanceStatus};

use super::{ApplyArgs, Eager, HistoryArgs, PlanArgs};
use crate::{
    app::App,
    commands::{host::left, world::Hosts},
    daemon,
    exit::{Failure, Kind},
    out,
    render::{self, Table},
};

/// Whether the daemon of this host has others beside it.
pub async fn is_for(app: &App) -> bool {
    daemon::hosts(app).await.is_some_and(|hosts| hosts.len() > 1)
}

fn request(eager: Eager, hosts: &Hosts, parallel: Option<u8>) -> BalanceRequest {
    let interval = hosts.interval.unsigned_abs().as_secs().max(1);
    BalanceRequest { eagerness: Some(eager.eagerness), parallel, interval_s: Some(interval) }
}

/// What should move now.
pub async fn plan(app: &App, args: &PlanArgs) -> Result<(), Failure> {
    let request = request(args.eager, &args.source.hosts, None);
    let round: BalanceRound = daemon::client(app).post("/api/v1/balance/plan", &request, None).await?;
    if app.json { out::json(&round) } else { out::text(&text(&round)) }
}

/// Moves it.
pub async fn apply(app: &App, args: &ApplyArgs) -> Result<(), Failure> {
    if args.rules.is_some() || !args.how.is_unsaid() {
        let text = "the daemon takes rules and how VMs move from [moves] of its configuration";
        return Err(Failure::new(Kind::Usage, text).hint("name the hosts with --with to balance without the daemon"));
    }
    let request = request(args.eager, &args.hosts, Some(args.parallel));
    let job = daemon::done(app, "/api/v1/balance/apply", &request, "balance").await?;
    let left_behind = job.result.as_ref().map(|result| result.left.clone()).unwrap_or_default();
    if !app.json {
        out::text(&left(&left_behind))?;
    }
    let told = daemon::tell(app, &job, |job| {
        let moved = job.result.as_ref().and_then(|result| result.moved).unwrap_or(0);
        if moved == 0 { "nothing had to move\n".to_owned() } else { format!("{moved} VMs have moved\n") }
    });
    told.map_err(|failure| if left_behind.is_empty() { failure } else { Failure { kind: Kind::Partial, ..failure } })
}

/// How it balances by itself.
pub async fn auto(app: &App) -> Result<(), Failure> {
    let status: BalanceStatus = daemon::client(app).get("/api/v1/balance").await?;
    if app.json {
        return out::json(&status);
    }
    let mode = match status.mode {
        BalanceMode::Off => "off: nothing moves by itself (mode in [balance] of the configuration)".to_owned(),
        BalanceMode::Recommend => format!("recommended every {} s, eagerness {}", status.interval_s, status.eagerness),
        BalanceMode::Automatic => format!("automatic every {} s, eagerness {}", status.interval_s, status.eagerness),
    };
    let last = status.last.as_ref().map_or_else(|| "there was no round yet\n".to_owned(), text);
    out::text(&format!("balancing is {mode}\n\n{last}"))
}

/// Rounds in which something should move.
pub async fn history(app: &App, args: &HistoryArgs) -> Result<(), Failure> {
    let path = format!("/api/v1/balance/history?limit={}", args.limit);
    let rounds: Vec<BalanceRound> = daemon::client(app).get(&path).await?;
    if app.json {
        return out::json(&rounds);
    }
    let mut table = Table::new(&["TIME", "VM", "FROM", "TO", "DONE", "WHY"]);
    for round in &rounds {
        for of in &round.moves {
            table.row([
                render::local_time(round.at),
                of.vm.name.clone(),
                of.from.clone(),
                of.to.clone(),
                round.job.map_or_else(|| "recommended".to_owned(), |job| format!("job {job}")),
                of.why.clone(),
            ]);
        }
    }
    out::text(&table.render(out::stdout_is_terminal()))
}

fn text(round: &BalanceRound) -> String {
    let mut text = format!("{}, by {} on {}\n", render::local_time(round.at), round.by, round.node);
    if let Some(error) = &round.error {
        return text + &render::printable(&format!("no plan could be made: {error}")) + "\n";
    }
    text += &hosts(&round.hosts);
    if !round.moves.is_empty() {
        let mut table = Table::new(&["VM", "FROM", "TO", "AFTER", "WHY"]);
        for of in &round.moves {
            table.row([of.vm.name.clone(), of.from.clone(), of.to.clone(), of.after.join(" "), of.why.clone()]);
        }
        text += "\n";
        text += &table.render(out::stdout_is_terminal());
    }
    text += &left(&round.left);
    if let Some(nothing) = &round.nothing {
        text += &(render::printable(&format!("nothing moves: {nothing}")) + "\n");
    }
    text
}

fn hosts(hosts: &[BalanceHost]) -> String {
    let mut table = Table::new(&["HOST", "CPU", "MEMORY", "VMS", ""]);
    let change = |before: u64, after: u64, unit: &str| match before == after {
        true => format!("{before}{unit}"),
        false => format!("{before}{unit} → {after}{unit}"),
    };
    for host in hosts {
        table.row([
            host.host.clone(),
            change(host.cpu_percent, host.cpu_percent_after, " %"),
            change(host.memory_percent, host.memory_percent_after, " %"),
            change(u64::from(host.vms), u64::from(host.vms_after), ""),
            host.closed.clone().unwrap_or_default(),
        ]);
    }
    table.render(out::stdout_is_terminal())
}
