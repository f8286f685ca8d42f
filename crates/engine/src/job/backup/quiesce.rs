//! Freezing the guest's file systems for the instant of the cut, and thawing them whatever happens.
//!
//! Three things thaw a guest: this job, right after the cut; a guard process of ours that notices this job's death; and
//! the next run, which finds the marker file. A guest is never frozen without the marker and the guard in place.

use std::{
    path::{Path, PathBuf},
    process::Stdio,
    time::{Duration, Instant},
};

use tokio::{
    io::AsyncWriteExt,
    process::{Child, ChildStdin, Command},
};
use uuid::Uuid;
use virtward_hypervisor::ErrorKind;
use virtward_model::{QuiesceOutcome, QuiesceRecord, QuiesceRequest, VmState};

use crate::{Env, Error, Result, job::backup::BackupOptions, lock::AgentTurn, tool};

/// Longest time that a guest stays frozen before the guard thaws it.
const FROZEN_MAX: Duration = Duration::from_secs(10);
const HOOK_TIMEOUT: Duration = Duration::from_secs(30);
const THAW_ATTEMPTS: u32 = 5;

/// A guest between freeze and thaw (or one that was not frozen at all).
pub(super) struct Quiesced<'a> {
    env: &'a Env,
    vm: Uuid,
    name: &'a str,
    options: &'a BackupOptions,
    record: QuiesceRecord,
    frozen: Option<Frozen>,
    hook_ran: bool,
    /// Nobody else of ours talks to the agent until the guest is thawed.
    _turn: Option<AgentTurn>,
}

struct Frozen {
    since: Instant,
    count: u32,
    guard: Option<Guard>,
    marker: PathBuf,
}

/// A process of ours that puts a guest right if this one dies.
pub(super) struct Guard {
    child: Child,
    stdin: ChildStdin,
}

fn marker(env: &Env, vm: Uuid) -> PathBuf {
    frozen_marker(&env.dirs.runtime, vm)
}

/// The file that is there while a guest may be frozen by us.
pub(crate) fn frozen_marker(runtime: &Path, vm: Uuid) -> PathBuf {
    runtime.join("frozen").join(vm.to_string())
}

/// Thaws a guest that an earlier, killed run left frozen. Returns whether there was one.
pub(super) async fn thaw_leftover(env: &Env, vm: Uuid) -> bool {
    let marker = marker(env, vm);
    if !marker.exists() {
        return false;
    }
    // The guard has probably done it already; a second thaw is harmless.
    let _ = env.hypervisor.fs_thaw(vm).await;
    let _ = std::fs::remove_file(marker);
    true
}

/// Forgets the marker of a guest that is shut off: nothing is frozen there.
pub(super) fn forget_leftover(env: &Env, vm: Uuid) {
    let _ = std::fs::remove_file(marker(env, vm));
}

/// Whether the guest's agent answers, if it is needed. Asked while the backup is prepared, as it can take long.
pub(super) async fn ask_agent(env: &Env, vm: Uuid, state: VmState, options: &BackupOptions) -> Asked {
    match state {
        _ if options.quiesce == QuiesceRequest::Off => Asked::nothing(),
        VmState::Paused => {
            let why = "the VM is paused, so its agent cannot answer".to_owned();
            Asked { answer: Err((QuiesceOutcome::NoAgent, why)), turn: None }
        }
        _ => {
            let turn = AgentTurn::take(&env.dirs.runtime, vm, options.agent_timeout).await;
            let timeout_s = options.agent_timeout.as_secs().clamp(1, 600) as u32;
            let answer = env.hypervisor.agent(vm, r#"{"execute":"guest-ping"}"#, timeout_s).await;
            let refused = |error: virtward_hypervisor::Error| format!("guest agent: {}", error.message);
            Asked { answer: answer.map(drop).map_err(|error| (QuiesceOutcome::NoAgent, refused(error))), turn }
        }
    }
}

/// Freezes as asked. Only a `required` quiesce can fail; everything else ends up in the record.
pub(super) async fn freeze<'a>(
    env: &'a Env,
    vm: Uuid,
    name: &'a str,
    agent: Asked,
    options: &'a BackupOptions,
) -> Result<Quiesced<'a>> {
    let record =
        QuiesceRecord { requested: options.quiesce, outcome: QuiesceOutcome::NotNeeded, frozen_ms: None, reason: None };
    let mut quiesced = Quiesced { env, vm, name, options, record, frozen: None, hook_ran: false, _turn: agent.turn };
    if options.quiesce == QuiesceRequest::Off {
        return Ok(quiesced);
    }
    let attempt = match agent.answer {
        Ok(()) => quiesced.try_freeze().await,
        refused => refused,
    };
    if let Err((outcome, reason)) = attempt {
        quiesced.record.outcome = outcome;
        quiesced.record.reason = Some(reason);
        if let Err(refusal) = check(name, &quiesced.record) {
            quiesced.post_thaw_hook().await;
            return Err(refusal);
        }
    }
    Ok(quiesced)
}

/// Refuses a restore point that had to be quiesced and is not.
pub(super) fn check(name: &str, record: &QuiesceRecord) -> Result<()> {
    let failed = matches!(record.outcome, QuiesceOutcome::Failed | QuiesceOutcome::NoAgent);
    if record.requested != QuiesceRequest::Required || !failed {
        return Ok(());
    }
    Err(Error::Quiesce(format!(
        "{name} could not be quiesced and --quiesce required was given: {}. Start qemu-guest-agent in the guest, or use \
         --quiesce auto for a crash-consistent restore point",
        record.reason.as_deref().unwrap_or("the freeze failed")
    )))
}

type Refusal = (QuiesceOutcome, String);

/// What the agent said, or why it cannot, and the right to say more to it.
pub(super) struct Asked {
    answer: std::result::Result<(), Refusal>,
    turn: Option<AgentTurn>,
}

impl Asked {
    /// There was nothing to ask it.
    pub(super) fn nothing() -> Self {
        Self { answer: Ok(()), turn: None }
    }
}

impl Quiesced<'_> {
    async fn try_freeze(&mut self) -> std::result::Result<(), Refusal> {
        let hypervisor = &self.env.hypervisor;
        self.pre_freeze_hook().await?;
        let marker = marker(self.env, self.vm);
        let failed = |what: &str, error: &dyn std::fmt::Display| (QuiesceOutcome::Failed, format!("{what}: {error}"));
        let parent = self.env.dirs.runtime.join("frozen");
        std::fs::create_dir_all(&parent)
            .and_then(|()| std::fs::write(&marker, self.name))
            .map_err(|error| failed("cannot write the marker of a frozen guest", &error))?;
        let guard = match Guard::start(self.env, self.vm, Guards::Freeze) {
            Ok(guard) => guard,
            Err(error) => {
                let _ = std::fs::remove_file(&marker);
                return Err(failed("cannot start the thaw guard", &error));
            }
        };
        let since = Instant::now();
        let answer = tokio::time::timeout(FROZEN_MAX, hypervisor.fs_freeze(self.vm)).await;
        let frozen = Frozen { since, count: 0, guard, marker };
        match answer {
            Ok(Ok(0)) => {
                self.thaw_now(frozen).await;
                Err((QuiesceOutcome::Failed, "the agent says that it froze no file system".into()))
            }
            Ok(Ok(count)) => {
                self.frozen = Some(Frozen { count, ..frozen });
                self.record.outcome = QuiesceOutcome::Frozen;
                Ok(())
            }
            Ok(Err(error)) => {
                let outcome = match error.kind {
                    ErrorKind::AgentUnavailable => QuiesceOutcome::NoAgent,
                    _ => QuiesceOutcome::Failed,
                };
                // A freeze that failed half-way leaves some file systems frozen.
                self.thaw_now(frozen).await;
                Err((outcome, format!("freeze: {}", error.message)))
            }
            Err(_) => {
                // The freeze may still happen behind our back: the guard, left without the word, thaws it then.
                drop(frozen);
                let reason = format!("the agent did not finish the freeze in {} s", FROZEN_MAX.as_secs());
                Err((QuiesceOutcome::Failed, reason))
            }
        }
    }

    /// Ends the freeze and gives the record with the time that it lasted, and a warning if the thaw is in doubt.
    pub(super) async fn thaw(mut self) -> (QuiesceRecord, Option<String>) {
        let mut warning = None;
        if let Some(frozen) = self.frozen.take() {
            let (count, since) = (frozen.count, frozen.since);
            let cut_after = since.elapsed();
            let thawed = self.thaw_now(frozen).await;
            let lasted = thawed.map_or_else(|| since.elapsed(), |(_, at)| at - since);
            self.record.frozen_ms = Some(lasted.as_millis() as u64);
            // The guard may have thawed the guest before the cut.
            if cut_after >= FROZEN_MAX {
                self.record.outcome = QuiesceOutcome::Failed;
                self.record.reason =
                    Some(format!("the cut came {} s after the freeze, which had ended by then", cut_after.as_secs()));
            }
            warning = match thawed {
                Some((0, _)) if cut_after < FROZEN_MAX => {
                    self.record.outcome = QuiesceOutcome::Failed;
                    self.record.reason = Some(
                        "the agent had nothing to thaw: the freeze had ended before, perhaps before the cut".into(),
                    );
                    None
                }
                Some((thawed, _)) if thawed < count => {
                    Some(format!("the agent froze {count} file systems and says that it thawed {thawed}"))
                }
                Some(_) => None,
                None => Some("the guest could not be thawed; the thaw guard goes on trying".into()),
            };
        }
        self.post_thaw_hook().await;
        (self.record.clone(), warning)
    }

    /// Thaws; the number of file systems and the instant.
    async fn thaw_now(&self, frozen: Frozen) -> Option<(u32, Instant)> {
        for attempt in 0..THAW_ATTEMPTS {
            let answer = tokio::time::timeout(Duration::from_secs(5), self.env.hypervisor.fs_thaw(self.vm)).await;
            match answer {
                Ok(Ok(count)) => {
                    let at = Instant::now();
                    if let Some(guard) = frozen.guard {
                        // Nobody waits for its end: it has the word as soon as this is written to its pipe.
                        tokio::spawn(guard.dismiss());
                    }
                    let _ = std::fs::remove_file(&frozen.marker);
                    return Some((count, at));
                }
                _ => tokio::time::sleep(Duration::from_millis(50 << attempt)).await,
            }
        }
        None
    }

    async fn pre_freeze_hook(&mut self) -> std::result::Result<(), Refusal> {
        let Some(command) = &self.options.hooks.pre_freeze else { return Ok(()) };
        self.hook_ran = true;
        let limit = self.options.hooks.timeout.unwrap_or(HOOK_TIMEOUT);
        tool::hook(command, self.name, limit).await.map_err(|error| (QuiesceOutcome::Failed, error.to_string()))
    }

    async fn post_thaw_hook(&mut self) {
        let Some(command) = &self.options.hooks.post_thaw else { return };
        // Runs whenever its partner may have run, and alone when it has no partner.
        if !self.hook_ran && self.options.hooks.pre_freeze.is_some() {
            return;
        }
        let limit = self.options.hooks.timeout.unwrap_or(HOOK_TIMEOUT);
        if let Err(error) = tool::hook(command, self.name, limit).await {
            let reason = self.record.reason.get_or_insert_default();
            if !reason.is_empty() {
                reason.push_str("; ");
            }
            reason.push_str(&error.to_string());
        }
    }
}

/// What a guard ends.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Guards {
    /// Frozen file systems.
    Freeze,
    /// Stopped vCPUs.
    Pause,
}

impl Guard {
    pub(super) fn start(env: &Env, vm: Uuid, what: Guards) -> std::io::Result<Option<Self>> {
        let Some((program, arguments)) = env.thaw_guard.as_ref().and_then(|words| words.split_first()) else {
            return Ok(None);
        };
        let mut child = Command::new(program)
            .args(arguments)
            .args(["--connect", &env.uri, "--vm", &vm.to_string()])
            .args(["--after-ms", &FROZEN_MAX.as_millis().to_string()])
            .args((what == Guards::Pause).then_some("--resume"))
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()?;
        let stdin = child.stdin.take().ok_or_else(|| std::io::Error::other("the guard has no standard input"))?;
        Ok(Some(Self { child, stdin }))
    }

    /// Tells it that all is well.
    pub(super) async fn dismiss(mut self) {
        let _ = self.stdin.write_all(b"thawed\n").await;
        drop(self.stdin);
        let _ = tokio::time::timeout(Duration::from_secs(2), self.child.wait()).await;
    }
}
