//! The files of the ROADEF/EURO challenge 2012: a model and an assignment, integers separated by white space.

use super::{Balance, Malformed, Problem};

struct Numbers<'a> {
    words: std::str::SplitAsciiWhitespace<'a>,
    taken: usize,
}

impl Numbers<'_> {
    fn next(&mut self, what: &str) -> Result<i64, Malformed> {
        self.taken += 1;
        let word = self.words.next().ok_or_else(|| Malformed(format!("the file ends where {what} should be")))?;
        word.parse().map_err(|_| Malformed(format!("number {}: {word:?} is not {what}", self.taken)))
    }

    /// A count or an index; bounded, so that a wrong file does not ask for all memory.
    fn count(&mut self, what: &str) -> Result<usize, Malformed> {
        let number = self.next(what)?;
        usize::try_from(number)
            .ok()
            .filter(|&count| count <= 10_000_000)
            .ok_or_else(|| Malformed(format!("number {}: {number} is not {what}", self.taken)))
    }

    fn index(&mut self, what: &str) -> Result<u32, Malformed> {
        Ok(self.count(what)? as u32)
    }

    fn many(&mut self, count: usize, what: &str, to: &mut Vec<i64>) -> Result<(), Malformed> {
        (0..count).try_for_each(|_| {
            to.push(self.next(what)?);
            Ok(())
        })
    }
}

/// Reads a model and the assignment to begin with.
pub fn read(model: &str, initial: &str) -> Result<Problem, Malformed> {
    let mut numbers = Numbers { words: model.split_ascii_whitespace(), taken: 0 };
    let mut problem = Problem { resources: numbers.count("the number of resources")?, ..Problem::default() };
    for _ in 0..problem.resources {
        problem.transient.push(numbers.next("transient or not")? != 0);
        problem.load_weight.push(numbers.next("a load weight")?);
    }
    machines(&mut numbers, &mut problem)?;
    services(&mut numbers, &mut problem)?;
    let processes = numbers.count("the number of processes")?;
    for _ in 0..processes {
        problem.service.push(numbers.index("a service")?);
        let resources = problem.resources;
        numbers.many(resources, "a requirement", &mut problem.need)?;
        problem.move_cost.push(numbers.next("a move cost")?);
    }
    for _ in 0..numbers.count("the number of balances")? {
        problem.balances.push(Balance {
            first: numbers.count("a resource")?,
            second: numbers.count("a resource")?,
            target: numbers.next("a balance target")?,
            weight: numbers.next("a balance weight")?,
        });
    }
    problem.move_weight = numbers.next("the weight of process moves")?;
    problem.service_weight = numbers.next("the weight of service moves")?;
    problem.distance_weight = numbers.next("the weight of machine moves")?;
    problem.initial = assignment(initial)?;
    problem.validate()?;
    Ok(problem)
}

fn machines(numbers: &mut Numbers, problem: &mut Problem) -> Result<(), Malformed> {
    let (machines, resources) = (numbers.count("the number of machines")?, problem.resources);
    for _ in 0..machines {
        problem.neighbourhood.push(numbers.index("a neighbourhood")?);
        problem.location.push(numbers.index("a location")?);
        numbers.many(resources, "a capacity", &mut problem.capacity)?;
        numbers.many(resources, "a safety capacity", &mut problem.soft)?;
        for _ in 0..machines {
            problem.distance.push(numbers.index("a machine move cost")?);
        }
    }
    Ok(())
}

fn services(numbers: &mut Numbers, problem: &mut Problem) -> Result<(), Malformed> {
    for _ in 0..numbers.count("the number of services")? {
        problem.spread.push(numbers.index("a spread")?);
        let dependencies = numbers.count("the number of dependencies")?;
        let depends = (0..dependencies).map(|_| numbers.index("a service")).collect::<Result<_, _>>()?;
        problem.depends.push(depends);
    }
    Ok(())
}

/// Reads an assignment: one machine for each process.
pub fn assignment(text: &str) -> Result<Vec<u32>, Malformed> {
    let mut numbers = Numbers { words: text.split_ascii_whitespace(), taken: 0 };
    let mut machines = Vec::new();
    while numbers.words.clone().next().is_some() {
        machines.push(numbers.index("a machine")?);
    }
    Ok(machines)
}

/// Writes an assignment as the challenge's checker reads it.
pub fn write(machines: &[u32]) -> String {
    let mut text = machines.iter().map(u32::to_string).collect::<Vec<_>>().join(" ");
    text.push('\n');
    text
}
