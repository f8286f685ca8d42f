//! Machine reassignment as ROADEF/EURO posed it in 2012, with the search that moves VMs.
//!
//!     reassign --model FILE --initial FILE --seconds N --out FILE [--seed S] [--rounds N] [--threads N]
//!
//! Every thread has a search of its own seed. They step in rounds, and begin each cycle with the best that any of them
//! knows, so a number of rounds has one result for a seed, however fast the machine is; the time only decides how many
//! rounds are planned. They are printed, and `--rounds` runs exactly so many.

use std::{
    error::Error,
    fs,
    time::{Duration, Instant},
};

use virtward_decide::assign::{Best, Problem, Search, check, roadef};

struct Args {
    model: String,
    initial: String,
    out: Option<String>,
    seconds: f64,
    rounds: Option<u64>,
    seed: u64,
    threads: usize,
    verbose: bool,
}

fn args() -> Result<Args, Box<dyn Error>> {
    let mut args = Args {
        model: String::new(),
        initial: String::new(),
        out: None,
        seconds: 20.0,
        rounds: None,
        seed: 1,
        threads: 2,
        verbose: false,
    };
    let mut given = std::env::args().skip(1);
    while let Some(option) = given.next() {
        let mut value = || given.next().ok_or(format!("{option} needs a value"));
        match option.as_str() {
            "--model" => args.model = value()?,
            "--initial" => args.initial = value()?,
            "--out" => args.out = Some(value()?),
            "--seconds" => args.seconds = value()?.parse()?,
            "--rounds" => args.rounds = Some(value()?.parse()?),
            "--seed" => args.seed = value()?.parse()?,
            "--threads" => args.threads = value()?.parse::<usize>()?.max(1),
            "--verbose" => args.verbose = true,
            _ => {
                return Err(format!(
                    "unknown option {option}; --model, --initial, --seconds, --out, --seed, --rounds, --threads"
                )
                .into());
            }
        }
    }
    if args.model.is_empty() || args.initial.is_empty() {
        return Err("--model FILE and --initial FILE are needed".into());
    }
    Ok(args)
}

fn main() -> Result<(), Box<dyn Error>> {
    let started = Instant::now();
    let args = args()?;
    let read = |path: &str| fs::read_to_string(path).map_err(|error| format!("{path}: {error}"));
    let problem = roadef::read(&read(&args.model)?, &read(&args.initial)?)?;
    let before = check(&problem, &problem.initial)?;
    let reading = started.elapsed();
    let (best, rounds) = search(&problem, &args, started + Duration::from_secs_f64(args.seconds));
    let cost = check(&problem, &best.machines)?;
    if cost != i128::from(best.cost) {
        return Err(format!("the search says {}, the checker says {cost}", best.cost).into());
    }
    if let Some(out) = &args.out {
        fs::write(out, roadef::write(&best.machines)).map_err(|error| format!("{out}: {error}"))?;
    }
    println!("{cost}");
    eprintln!(
        "from {before}; {} processes, {} machines, read in {:.1} s; {rounds} rounds of {} threads, seed {}, {:.1} s",
        problem.processes(),
        problem.machines(),
        reading.as_secs_f64(),
        args.threads,
        args.seed,
        started.elapsed().as_secs_f64()
    );
    Ok(())
}

/// Rounds for the time that is left: as many as some at the beginning tell, with all threads at work, and fewer. A search that
/// is cut off never cooled down, which costs more than the end of the time unused.
fn plan(problem: &Problem, args: &Args, until: Instant) -> u64 {
    const SAMPLE: u32 = 32;
    const SHARE: f64 = 0.85;
    let sample = || {
        let mut search = Search::new(problem, args.seed, 64);
        let started = Instant::now();
        (0..SAMPLE).for_each(|_| search.step());
        started.elapsed().as_secs_f64()
    };
    let slowest = std::thread::scope(|scope| {
        let samples: Vec<_> = (0..args.threads).map(|_| scope.spawn(sample)).collect();
        samples.into_iter().map(|sample| sample.join().expect("a search does not panic")).fold(1e-6, f64::max)
    });
    let left = until.saturating_duration_since(Instant::now()).as_secs_f64();
    (left * SHARE / slowest * f64::from(SAMPLE)).max(1.0) as u64
}

fn search(problem: &Problem, args: &Args, until: Instant) -> (Best, u64) {
    let seed = |thread: usize| args.seed.wrapping_mul(0x1_0000).wrapping_add(thread as u64);
    let planned = args.rounds.unwrap_or_else(|| plan(problem, args, until));
    let mut searches: Vec<Search> = std::thread::scope(|scope| {
        let started: Vec<_> =
            (0..args.threads).map(|thread| scope.spawn(move || Search::new(problem, seed(thread), planned))).collect();
        started.into_iter().map(|thread| thread.join().expect("a search does not panic")).collect()
    });
    let mut rounds = 0;
    while rounds < planned {
        std::thread::scope(|scope| {
            for search in &mut searches {
                scope.spawn(|| search.step());
            }
        });
        rounds += 1;
        if searches[0].is_between_cycles() {
            let best = best(&searches).clone();
            if args.verbose {
                eprintln!("round {rounds} of {planned}: {}", best.cost);
            }
            searches.iter_mut().for_each(|search| search.adopt(&best));
        }
        // The plan was made on a faster machine, it seems; then the result is not that of so many rounds.
        if args.rounds.is_none() && Instant::now() >= until {
            eprintln!("cut off after {rounds} of {planned} rounds");
            break;
        }
    }
    (best(&searches).clone(), rounds)
}

fn best<'a>(searches: &'a [Search]) -> &'a Best {
    let all = searches.iter().map(Search::best);
    all.min_by_key(|best| best.cost).expect("there is a thread")
}
