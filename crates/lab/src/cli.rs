//! The command line's grammar, and nothing else: what may be typed, with its help.

use std::{path::PathBuf, time::Duration};

use anyhow::Context;
use clap::{Args, Parser, Subcommand, ValueEnum};
use virtward_model::Bytes;

use crate::names::{HostName, LabName, VmName};

/// Several real libvirt hosts on one machine, to test Virtward or to try it with nothing at stake.
///
/// A host is a network, mount and UTS namespace with a libvirtd of its own; its guests are small emulated ones that
/// boot in seconds. Everything a lab made is gone after `down`.
#[derive(Debug, Parser)]
#[command(
    name = "virtward-lab",
    version,
    after_help = "\
Examples:
  virtward-lab up --hosts 2                       two hosts, h1 and h2
  eval \"$(virtward-lab env --host h1)\"            let virtward and virsh speak to h1
  virtward-lab vm create web1 --host h1 --disk 2GiB --fill 600MiB
  virtward-lab vm exec web1 -- sh -c 'dd if=/dev/urandom of=/data/new bs=1M count=16; sync'
  virtward-lab host power off h1                  as if its power cord were pulled
  virtward-lab down                               leaves nothing behind"
)]
pub struct Cli {
    /// Which lab: several can be up at once.
    #[arg(long = "name", id = "lab", global = true, value_name = "LAB", default_value = "lab")]
    pub lab: LabName,
    /// Print JSON instead of text.
    #[arg(long, global = true)]
    pub json: bool,
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

/// The commands.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Start a lab.
    #[command(after_help = "\
Examples:
  virtward-lab up                                 three hosts, lab name \"lab\"
  virtward-lab up --name t --hosts 1 --json
  virtward-lab up --hosts 3 --etcd                with a three-member etcd on the hosts
  virtward-lab up --etcd --daemon target/debug/virtward
  virtward-lab up --root /srv/debian12            with the libvirt and QEMU of another system")]
    Up(UpArgs),
    /// Show the lab: its hosts, whether they have power, where their libvirt answers.
    Status,
    /// Stop the lab and remove everything of it, also after a crash or a half-way `up`.
    Down,
    /// List the labs of this machine.
    List,
    /// Print shell lines that point virtward and virsh at a host: eval "$(virtward-lab env)".
    Env(EnvArgs),
    /// Act on a host: run a command in it, cut its power, stop its libvirtd.
    #[command(subcommand)]
    Host(HostCommand),
    /// Cut a host off from the network, from everything or from one other host.
    #[command(after_help = "\
Examples:
  virtward-lab partition h1                       h1 hears nobody and nobody hears h1
  virtward-lab partition h1 --from h2             only these two lose each other
  virtward-lab partition h1 --one-way             what h1 sends is lost; it still hears the others
  virtward-lab heal")]
    Partition(PartitionArgs),
    /// Undo every partition.
    Heal,
    /// Shape the network.
    #[command(subcommand)]
    Net(NetCommand),
    /// Let the shared storage stop answering a host's guests, and answer again.
    #[command(subcommand)]
    Storage(StorageCommand),
    /// Make, use and remove guests.
    #[command(subcommand)]
    Vm(VmCommand),
    /// Back up, change, destroy and restore real guests, told as a story; DEMO_KEEP=1 leaves everything in place
    Demo {
        /// The `virtward` binary
        #[arg(long, default_value = "target/release/virtward")]
        virtward: std::path::PathBuf,
        /// Only take away what an earlier demo with DEMO_KEEP=1 left
        #[arg(long)]
        clear: bool,
    },
    /// A host's watchdog and power switch. Started by `up`; of no use by hand.
    #[command(hide = true)]
    Bmc {
        /// The host.
        host: HostName,
    },
    /// The lab's fence agent: parameters on standard input. See `status --json` for the program to call.
    #[command(hide = true)]
    FenceAgent,
    /// The first process of a host. Started by `up`; of no use by hand.
    #[command(hide = true)]
    HostInit {
        /// The host to become.
        host: HostName,
    },
}

/// Arguments of `up`.
#[derive(Debug, Args)]
pub struct UpArgs {
    /// How many hosts, named h1, h2, ...
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u8).range(1..=16))]
    pub hosts: u8,
    /// Also run etcd: a member on each of the first three hosts, or one member when there are fewer hosts.
    #[arg(long)]
    pub etcd: bool,
    /// Also run this `virtward` as the daemon of every host, joined to one cluster.
    #[arg(long, value_name = "PATH", requires = "etcd")]
    pub daemon: Option<PathBuf>,
    /// A file to add to the daemons' configurations; @HOST@, @WATCHDOG@ and @FENCE_AGENT@ in it are replaced.
    #[arg(long, value_name = "FILE", requires = "daemon")]
    pub daemon_config: Option<PathBuf>,
    /// Take libvirt, QEMU and all other programs of the hosts from the system installed in this directory.
    #[arg(long, env = "VIRTWARD_LAB_ROOT", value_name = "DIR")]
    pub root: Option<PathBuf>,
}

impl UpArgs {
    /// The daemon, as it is found from anywhere.
    pub fn daemon(&self) -> anyhow::Result<Option<PathBuf>> {
        let found = |path: &PathBuf| path.canonicalize().with_context(|| format!("there is no {}", path.display()));
        self.daemon.as_ref().map(found).transpose()
    }

    /// What is added to the daemons' configurations.
    pub fn daemon_config(&self) -> anyhow::Result<String> {
        let read =
            |path: &PathBuf| std::fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()));
        Ok(self.daemon_config.as_ref().map(read).transpose()?.unwrap_or_default())
    }
}

/// Arguments of `env`.
#[derive(Debug, Args)]
pub struct EnvArgs {
    /// The host to point at; the first one unless told.
    #[arg(long)]
    pub host: Option<HostName>,
}

/// Commands on a host.
#[derive(Debug, Subcommand)]
pub enum HostCommand {
    /// Run a command inside a host; its exit status is passed on.
    #[command(after_help = "Example:\n  virtward-lab host exec h1 -- virsh list --all")]
    Exec {
        /// The host.
        host: HostName,
        /// The command and its arguments, after `--`.
        #[arg(last = true, required = true)]
        command: Vec<String>,
    },
    /// Cut or restore the power: `off` kills everything in the host at once, QEMU included.
    Power {
        /// On or off.
        switch: Switch,
        /// The host.
        host: HostName,
    },
    /// Stop everything in a host where it stands, its clocks going on; its watchdog and its power switch still work.
    Pause {
        /// The host.
        host: HostName,
    },
    /// Let a paused host go on as if nothing had happened.
    Resume {
        /// The host.
        host: HostName,
    },
    /// Act on a host's daemon, in a lab that was made with --daemon.
    Daemon {
        /// What to do.
        action: crate::daemon::Action,
        /// The host.
        host: HostName,
    },
    /// Choose how a host's fence device behaves.
    #[command(
        after_help = "Example:\n  virtward-lab host fence-mode h1 dead      as if the BMC had lost its power too"
    )]
    FenceMode {
        /// The host.
        host: HostName,
        /// The behaviour.
        mode: crate::fence::Mode,
    },
    /// Act on a host's libvirtd alone; running guests go on.
    Libvirtd {
        /// What to do.
        action: LibvirtdAction,
        /// The host.
        host: HostName,
    },
}

/// The two positions of a power switch.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Switch {
    /// Give it power: libvirtd starts with the definitions it had on disk.
    On,
    /// Take its power away.
    Off,
}

/// What can be done to a libvirtd.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum LibvirtdAction {
    /// Start it.
    Start,
    /// Stop it in order (SIGTERM).
    Stop,
    /// Stop and start it.
    Restart,
    /// Kill it at once (SIGKILL), as a crash does.
    Kill,
}

/// Arguments of `partition`.
#[derive(Debug, Args)]
pub struct PartitionArgs {
    /// The host to cut off.
    pub host: HostName,
    /// Only from this other host.
    #[arg(long)]
    pub from: Option<HostName>,
    /// Lose only what HOST sends; what the others send still reaches it.
    #[arg(long)]
    pub one_way: bool,
}

/// Commands on the network.
#[derive(Debug, Subcommand)]
pub enum NetCommand {
    /// Limit a host's bandwidth in both directions.
    #[command(after_help = "Examples:\n  virtward-lab net limit h1 100mbit\n  virtward-lab net limit h1 none")]
    Limit {
        /// The host.
        host: HostName,
        /// A rate such as 100mbit or 1gbit, or none.
        rate: crate::net::Rate,
    },
}

/// Commands on the shared storage.
#[derive(Debug, Subcommand)]
pub enum StorageCommand {
    /// Nothing that the running guests of a host read or write directly is answered any more.
    Stall {
        /// The host.
        host: HostName,
    },
    /// It answers again; what waited is done.
    Heal {
        /// The host.
        host: HostName,
    },
}

/// Commands on guests.
#[derive(Debug, Subcommand)]
pub enum VmCommand {
    /// Define a guest with formatted, filled disks, and start it.
    Create(Box<CreateArgs>),
    /// Run a command in a guest through its agent, wherever it runs; output and exit status are passed on.
    #[command(after_help = "Example:\n  virtward-lab vm exec web1 -- sh -c 'cd /data && sha256sum -c -s SHA256SUMS'")]
    Exec {
        /// The guest.
        vm: VmName,
        /// Give up when the command has not ended after this long.
        #[arg(long, default_value = "10m", value_parser = parse_duration)]
        timeout: Duration,
        /// The command and its arguments, after `--`.
        #[arg(last = true, required = true)]
        command: Vec<String>,
    },
    /// Wait until a guest is up: its agent answers, or, without an agent, it has mounted its disk.
    Wait {
        /// The guest.
        vm: VmName,
        /// How long to wait.
        #[arg(long, default_value = "60s", value_parser = parse_duration)]
        timeout: Duration,
    },
    /// Look at what a guest made with --writer wrote: exit status 1 if ever two wrote at once, or a write was lost.
    CheckWriters {
        /// The guest.
        vm: VmName,
    },
    /// List the guests of all hosts.
    List,
    /// Stop a guest at once, undefine it and delete its disks.
    Rm {
        /// The guests.
        #[arg(required = true)]
        vm: Vec<VmName>,
    },
}

/// Arguments of `vm create`.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  virtward-lab vm create web1 --host h1 --disk 2GiB --fill 600MiB
  virtward-lab vm create db1 --disk 4GiB --fs xfs --fill 1GiB --disk 1GiB --format raw
  virtward-lab vm create gpt1 --disk 1GiB --partitioned --pool local --no-start

The first disk is mounted at /data, further ones at /data2, /data3, ... Each holds SHA256SUMS of its files. The data
depends on the guest's name only, so two guests of one name in two labs hold the same.")]
pub struct CreateArgs {
    /// The guest's name.
    pub vm: VmName,
    /// The host that gets it; the first one unless told.
    #[arg(long)]
    pub host: Option<HostName>,
    /// The size of a disk; repeat for further disks, leave out for a guest without any.
    #[arg(long = "disk", value_name = "SIZE")]
    pub disks: Vec<Bytes>,
    /// File system of the disks.
    #[arg(long, value_enum, default_value_t = Fs::Ext4)]
    pub fs: Fs,
    /// How much data to put on the first disk; repeat for the second, third, ...
    #[arg(long, value_name = "SIZE")]
    pub fill: Vec<Bytes>,
    /// Format of the disk files.
    #[arg(long, value_enum, default_value_t = Format::Qcow2)]
    pub format: Format,
    /// Give the first disk a GPT with two partitions, /data and /data-p2, sharing the fill 3 to 1.
    #[arg(long)]
    pub partitioned: bool,
    /// Where the disk files are: seen by all hosts, or by this one only.
    #[arg(long, value_enum, default_value_t = Pool::Shared)]
    pub pool: Pool,
    /// The guest's memory.
    #[arg(long, default_value = "192MiB")]
    pub memory: Bytes,
    /// The MAC address; a random one unless told.
    #[arg(long)]
    pub mac: Option<crate::names::Mac>,
    /// Make a guest without the guest agent.
    #[arg(long)]
    pub no_agent: bool,
    /// Add a disk to which the guest appends a record every 250 ms, for `vm check-writers`.
    #[arg(long)]
    pub writer: bool,
    /// Define it only.
    #[arg(long)]
    pub no_start: bool,
    /// Return when the guest is up, not when it was started.
    #[arg(long, conflicts_with = "no_start")]
    pub wait: bool,
    /// Also write the domain XML here (for a look at what was defined).
    #[arg(long, value_name = "FILE")]
    pub xml_to: Option<PathBuf>,
}

/// File systems of a data disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
#[allow(missing_docs)]
pub enum Fs {
    Ext4,
    Xfs,
    Btrfs,
}

/// Formats of a disk file.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
#[allow(missing_docs)]
pub enum Format {
    Qcow2,
    Raw,
}

impl Format {
    /// As QEMU and libvirt call it.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Qcow2 => "qcow2",
            Self::Raw => "raw",
        }
    }
}

/// Where a disk file lives.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Pool {
    /// In the directory that every host sees.
    Shared,
    /// In the host's own directory, which the other hosts do not see.
    Local,
}

/// `500ms`, `60s`, `10m`, `1h`, or a bare number of seconds.
fn parse_duration(text: &str) -> Result<Duration, String> {
    let split = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
    let (number, unit) = text.split_at(split);
    let millis_per_unit = match unit {
        "ms" => 1,
        "" | "s" => 1000,
        "m" => 60_000,
        "h" => 3_600_000,
        _ => return Err(format!("{text:?} is not a duration; write 500ms, 60s, 10m or 1h")),
    };
    let millis = number.parse::<u64>().ok().and_then(|n| n.checked_mul(millis_per_unit));
    millis.map(Duration::from_millis).ok_or_else(|| format!("{text:?} is not a duration; write 500ms, 60s, 10m or 1h"))
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    fn parse(line: &str) -> Result<Cli, clap::Error> {
        Cli::try_parse_from(line.split_whitespace())
    }

    #[test]
    fn the_grammar_is_sound() {
        Cli::command().debug_assert();
    }

    #[test]
    fn the_lab_is_named_on_every_command_and_wherever_it_stands() {
        for line in [
            "virtward-lab up --hosts 1 --name t",
            "virtward-lab --name t status --json",
            "virtward-lab vm create web1 --host h1 --disk 2GiB --fill 600MiB --name t",
            "virtward-lab vm exec web1 --name t -- sh -c true --name=x",
            "virtward-lab vm wait web1 --timeout 60s --name t",
            "virtward-lab host power off h1 --name t",
            "virtward-lab host libvirtd restart h1 --name t",
            "virtward-lab partition h1 --from h2 --one-way --name t",
            "virtward-lab net limit h1 100mbit --name t",
            "virtward-lab env --host h1 --name t",
        ] {
            let cli = parse(line).unwrap_or_else(|e| panic!("{line}: {e}"));
            assert_eq!(cli.lab.as_str(), "t", "{line}");
        }
        assert_eq!(parse("virtward-lab down").unwrap().lab.as_str(), "lab");
    }

    #[test]
    fn arguments_after_the_dashes_belong_to_the_guest() {
        let cli = parse("virtward-lab vm exec web1 -- ls --json --name x").unwrap();
        assert!(!cli.json);
        let Command::Vm(VmCommand::Exec { vm, command, .. }) = cli.command else { panic!("not vm exec") };
        assert_eq!((vm.as_str(), command.as_slice()), ("web1", &["ls", "--json", "--name", "x"].map(String::from)[..]));
    }

    #[test]
    fn nonsense_is_refused() {
        for line in [
            "virtward-lab up --hosts 0",
            "virtward-lab up --name ../etc",
            "virtward-lab up --name a.b",
            "virtward-lab vm create a/b --disk 1GiB",
            "virtward-lab vm create web1 --disk big",
            "virtward-lab vm wait web1 --timeout soon",
            "virtward-lab host exec h1",
            "virtward-lab host power sideways h1",
            "virtward-lab net limit h1 -5mbit",
            "virtward-lab vm create w --disk 1GiB --mac 01:00",
        ] {
            assert!(parse(line).is_err(), "{line} was accepted");
        }
    }

    #[test]
    fn durations_parse() {
        for (text, millis) in [("500ms", 500), ("60s", 60_000), ("90", 90_000), ("10m", 600_000)] {
            assert_eq!(parse_duration(text), Ok(Duration::from_millis(millis)), "{text}");
        }
        for text in ["", "s", "1.5s", "-1s", "99999999999999999999s", "1d"] {
            assert!(parse_duration(text).is_err(), "{text}");
        }
    }
}
