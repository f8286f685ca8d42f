//! `virtward upgrade-plan`: the order in which all hosts can be serviced, one at a time.

use virtward_decide::balance::{UpgradePlan, upgrade};

use super::{
    balance::show,
    world::{Source, look},
};
use crate::{
    app::App,
    exit::{Failure, Kind},
    out, render,
};

/// Arguments of `upgrade-plan`.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Every host is emptied, serviced and taken back before the next one; each turn
begins where the one before has left off. Carry it out with `host drain` and
`host resume`.

Examples:
  virtward upgrade-plan --with h2 --with h3
  virtward upgrade-plan --snapshot today.json --rules rules.toml --json")]
pub struct Args {
    #[command(flatten)]
    pub source: Source,
}

/// Plans.
pub async fn run(app: &App, args: &Args) -> Result<(), Failure> {
    let world = look(app, &args.source).await?.close().await;
    let (planned, failures) = (upgrade(&world), world.failover.failures);
    if app.json {
        out::json(&planned)?;
    } else {
        out::text(&text(&planned, failures))?;
    }
    let stay = planned.services.iter().filter(|service| !service.stays.is_empty()).count();
    match stay {
        0 => Ok(()),
        _ => Err(Failure::new(Kind::Refused, format!("{stay} hosts cannot be emptied")).reported()),
    }
}

fn text(planned: &UpgradePlan, failures: u32) -> String {
    let mut text = String::new();
    for (at, service) in planned.services.iter().enumerate() {
        let room = match (failures, service.keeps_failover_room) {
            (0, _) => String::new(),
            (failures, true) => format!("; {failures} failures are still survived meanwhile"),
            (failures, false) => format!("; {failures} failures are NOT survived meanwhile"),
        };
        let moves = service.plan.steps.len();
        text += &(render::printable(&format!("{}. {}: {moves} moves{room}", at + 1, service.host)) + "\n");
        text += &show::steps(&service.plan);
        text += &show::aside(&service.stays);
    }
    if planned.services.is_empty() {
        text += "no host is in service\n";
    }
    text
}
