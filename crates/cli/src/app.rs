//! From the command line to the exit status: parse, settle settings, log, run one command under signals, report.

use std::{
    env,
    io::{self, Write},
    process::ExitCode,
    sync::Arc,
};

use clap::Parser;
use tokio::signal::unix::{SignalKind, signal};
use tracing_subscriber::{
    filter::{EnvFilter, LevelFilter},
    layer::SubscriberExt,
    util::SubscriberInitExt,
};
use virtward_engine::Cancel;
use virtward_hypervisor::libvirt::exit_now;

use crate::{
    cli::{Cli, Command, Internal},
    commands::{
        backup, balance, cluster, completions, ha, hook, host, inventory, job, man, notify, policy, repo, restore,
        serve, state, status, storage, thaw_guard, token, upgrade_plan, vm,
    },
    config::{self, Settings},
    exit::{Failure, Kind},
    out,
    progress::Progress,
};

/// What every command works with.
pub struct App {
    /// Settings after precedence.
    pub settings: Settings,
    /// Results as JSON.
    pub json: bool,
    /// Raised by the first SIGINT or SIGTERM.
    pub cancel: Cancel,
    /// Progress, notes and warnings.
    pub progress: Arc<Progress>,
}

/// Runs the program.
pub fn main() -> ExitCode {
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) => return usage(&error),
    };
    let json = cli.global.json;
    let code = match run(cli) {
        Ok(()) => 0,
        Err(failure) => {
            if !failure.reported {
                report(&failure, json);
            }
            failure.kind.code()
        }
    };
    // A broken pipe was told already.
    let _ = io::stdout().flush();
    let _ = io::stderr().flush();
    exit_now(code)
}

/// Tells of a failure: in words on standard error and, with `--json`, as an object on standard output.
pub fn report(failure: &Failure, json: bool) {
    out::note(&failure.to_string());
    if json {
        // If standard output is gone the exit status is all that is left to tell.
        let _ = out::json(&failure.json());
    }
}

/// Help and version are results; anything else that clap says is a usage error.
fn usage(error: &clap::Error) -> ExitCode {
    let _ = error.print();
    if !error.use_stderr() {
        return ExitCode::SUCCESS;
    }
    if env::args_os().take_while(|arg| arg != "--").any(|arg| arg == "--json") {
        let text = error.to_string();
        let first = text.lines().next().unwrap_or_default().trim_start_matches("error: ").to_owned();
        let _ = out::json(&Failure::new(Kind::Usage, first).hint("virtward --help").json());
    }
    ExitCode::from(Kind::Usage.code())
}

fn run(cli: Cli) -> Result<(), Failure> {
    match &cli.command {
        // These need neither settings nor a runtime, and must work where nothing else does.
        Command::Completions(args) => return completions::run(args),
        Command::Man(args) => return man::run(args),
        Command::Hook(command) => return hook::run(command),
        Command::Internal(Internal::ThawGuard(args)) => return thaw_guard::run(&cli.global, args),
        _ => {}
    }
    let app = App {
        settings: config::load(&cli.global, &|name| env::var_os(name))?,
        json: cli.global.json,
        cancel: Cancel::default(),
        progress: Arc::new(Progress::new(cli.global.quiet)),
    };
    // A daemon's log is read by people who were not there: it says what it does.
    let is_daemon = matches!(cli.command, Command::Serve(_));
    log(cli.global.verbose + u8::from(is_daemon), is_daemon, &app.progress);
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()
        .map_err(Failure::io("cannot start the runtime"))?;
    let outcome = runtime.block_on(async {
        watch_signals(app.cancel.clone())?;
        match &cli.command {
            Command::Repo(command) => repo::run(&app, command).await,
            Command::Backup(command) => backup::run(&app, command).await,
            Command::Restore(command) => restore::run(&app, command).await,
            Command::Vm(command) => vm::run(&app, command).await,
            Command::Host(command) => host::run(&app, command).await,
            Command::Balance(command) => balance::run(&app, command).await,
            Command::Inventory(command) => inventory::run(&app, command).await,
            Command::UpgradePlan(args) => upgrade_plan::run(&app, args).await,
            Command::Storage(command) => storage::run(&app, command).await,
            Command::Serve(_) => serve::run(&app, &cli.global).await,
            Command::Status(_) => status::run(&app).await,
            Command::Job(command) => job::run(&app, command).await,
            Command::Policy(command) => policy::run(&app, command).await,
            Command::Token(command) => token::run(&app, command).await,
            Command::Cluster(command) => cluster::run(&app, command).await,
            Command::Notify(command) => notify::run(&app, command).await,
            Command::State(command) => state::run(&app, command).await,
            Command::Ha(command) => ha::run(&app, command).await,
            Command::Completions(_) | Command::Man(_) | Command::Hook(_) | Command::Internal(_) => Ok(()),
        }
    });
    // Blocking calls that nobody waits for any more must not hold the exit up.
    runtime.shutdown_background();
    outcome
}

/// The first signal asks the job to stop and clean up, the second one ends the process at once.
fn watch_signals(cancel: Cancel) -> Result<(), Failure> {
    for kind in [SignalKind::interrupt(), SignalKind::terminate()] {
        let mut signals = signal(kind).map_err(Failure::io("cannot listen for signals"))?;
        let cancel = cancel.clone();
        tokio::spawn(async move {
            while signals.recv().await.is_some() {
                if cancel.is_cancelled() {
                    std::process::exit(i32::from(Kind::Cancelled.code()));
                }
                cancel.cancel();
                out::note("stopping cleanly; once more stops at once");
            }
        });
    }
    Ok(())
}

/// Whether standard error goes to systemd's journal, as systemd itself says how to find out.
fn is_journal() -> bool {
    let Some(stream) = env::var("JOURNAL_STREAM").ok() else { return false };
    let Ok(own) = rustix::fs::fstat(io::stderr()) else { return false };
    stream == format!("{}:{}", own.st_dev, own.st_ino)
}

fn log(verbose: u8, is_daemon: bool, progress: &Progress) {
    let level = match verbose {
        0 => LevelFilter::ERROR,
        1 => LevelFilter::INFO,
        2 => LevelFilter::DEBUG,
        _ => LevelFilter::TRACE,
    };
    let filter =
        EnvFilter::builder().with_default_directive(level.into()).with_env_var("VIRTWARD_LOG").from_env_lossy();
    // With its fields, so that journalctl VIRTWARD_JOB=… finds all lines of a job.
    if is_daemon
        && is_journal()
        && let Ok(journal) = tracing_journald::layer()
    {
        let journal = journal.with_field_prefix(Some("VIRTWARD".into())).with_syslog_identifier("virtward".into());
        return tracing_subscriber::registry().with(filter).with(journal).init();
    }
    let writer = progress.log_writer();
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_ansi(io::IsTerminal::is_terminal(&io::stderr()))
        .with_writer(move || writer.clone())
        .init();
}
