//! Many concurrent callers, and an engine that runs as fast as it can.

use super::tally::Tally;
use super::{ANSWER, PROMPT};
use common::random::Random;
use common::requests::{ids, prompt, request};
use quell::{Engine, TokenStream};
use sim::{SimOptions, expected};
use std::collections::VecDeque;

const CALLERS: usize = 8;
/// Streams that a caller keeps without reading them.
const UNREAD: usize = 4;

pub fn engine(depth: usize) -> Engine {
    super::engine(SimOptions {
        depth,
        ..SimOptions::default()
    })
}

/// Runs this many requests to their ends.
pub fn run(engine: &Engine, requests: usize, random: &mut Random, tally: &mut Tally) {
    let callers: Vec<_> = (0..CALLERS)
        .map(|caller| {
            let share = requests / CALLERS + usize::from(caller < requests % CALLERS);
            let (engine, mut random) = (engine.clone(), Random(random.bits()));
            std::thread::spawn(move || call(&engine, share, &mut random))
        })
        .collect();
    for caller in callers {
        tally.add(&caller.join().unwrap());
    }
}

fn call(engine: &Engine, requests: usize, random: &mut Random) -> Tally {
    let mut tally = Tally::default();
    let mut unread: VecDeque<(TokenStream, usize)> = VecDeque::new();
    for _ in 0..requests {
        let prompt = prompt(random.below(1000), 1 + random.below(PROMPT));
        let wanted = 2 + random.below(ANSWER - 1);
        let mut stream = engine.generate(request(prompt.clone(), wanted)).unwrap();
        tally.submitted += 1;
        match random.below(16) {
            0..4 => {
                let answer = stream.complete_blocking().unwrap();
                assert_eq!(ids(&answer), expected(&prompt, wanted));
                tally.whole += 1;
            }
            4..7 => end(stream, wanted, random, &mut tally),
            7..15 => {
                for _ in 0..random.below(wanted) {
                    stream.next_blocking().unwrap().unwrap();
                }
                end(stream, wanted, random, &mut tally);
            }
            _ => {
                unread.push_back((stream, wanted));
                if unread.len() > UNREAD
                    && let Some((stream, wanted)) = unread.pop_front()
                {
                    end(stream, wanted, random, &mut tally);
                }
            }
        }
    }
    for (stream, wanted) in unread {
        end(stream, wanted, random, &mut tally);
    }
    tally
}

/// Drops the stream, cancels it without waiting for the receipt, or cancels it and waits.
fn end(stream: TokenStream, wanted: usize, random: &mut Random, tally: &mut Tally) {
    match random.below(4) {
        0 => {
            tally.dropped += 1;
            drop(stream);
        }
        1 => drop(stream.cancel()),
        _ => tally.receipt(&stream.cancel().wait().unwrap(), wanted),
    }
}
