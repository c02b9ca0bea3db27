//! The `apr` command: parses the command line, calls the engine, prints. The only crate that reads the environment.

use clap::{Parser, Subcommand};

mod commands;
mod failure;
mod gpu;
mod options;
mod page;
mod print;

use failure::{Done, Failure};

/// Runs and looks inside quantized Mixture-of-Experts language models in GGUF files.
#[derive(Parser)]
#[command(name = "apr", version, after_help = EXIT_CODES)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

const EXIT_CODES: &str = "Exit codes: 0 done, 1 failed, 2 wrong usage, 3 bad or unsupported model file, \
4 not enough memory, no such device or one that fails, or a port in use, 130 interrupted.";

#[derive(Subcommand)]
enum Command {
    /// Answer a prompt.
    #[command(after_help = EXIT_CODES)]
    Run(commands::run::Args),
    /// Answer requests over HTTP.
    Serve(commands::serve::Args),
    /// List what models can be computed on: this CPU and the GPUs.
    #[command(after_help = EXIT_CODES)]
    Devices(commands::devices::Args),
    /// Show what a model file holds: metadata, tensors, quant types, bytes per token, chat template.
    #[command(after_help = EXIT_CODES)]
    Inspect(commands::inspect::Args),
    /// Turn text into the model's tokens.
    #[command(after_help = EXIT_CODES)]
    Tokenize(commands::tokenize::Args),
    /// Measure prefill and decode speed, and the machine's read bandwidth beside them.
    #[command(after_help = EXIT_CODES)]
    Bench(commands::bench::Args),
    /// Look inside a model: its stages and shapes, or with a prompt every stage of the forward pass.
    #[command(after_help = EXIT_CODES)]
    Trace(commands::trace::Args),
    /// Find where two runs of a model part: two files, two devices, or saved traces.
    #[command(after_help = "Exit codes: 0 the sides are the same, 1 they differ, 2 they cannot be compared.")]
    Diff(commands::diff::Args),
    /// Check what must hold of every pass on a model, this machine and this build.
    #[command(after_help = EXIT_CODES)]
    Verify(commands::verify::Args),
    /// Run the op of a bundle of `apr diff` on a device and say whether the difference is there again.
    #[command(after_help = "Exit codes: 0 the op gives what it should, 1 the difference is there again, 2 trouble.")]
    Replay(commands::replay::Args),
}

fn main() -> std::process::ExitCode {
    let result = match Cli::parse().command {
        Command::Run(args) => commands::run::run(args),
        Command::Serve(args) => commands::serve::run(args),
        Command::Devices(args) => commands::devices::run(args),
        Command::Inspect(args) => commands::inspect::run(args),
        Command::Tokenize(args) => commands::tokenize::run(args),
        Command::Bench(args) => commands::bench::run(args),
        Command::Trace(args) => commands::trace::run(args),
        Command::Diff(args) => commands::diff::run(args),
        Command::Verify(args) => commands::verify::run(args),
        Command::Replay(args) => commands::replay::run(args),
    };
    match result {
        Ok(Done::Ok) => 0.into(),
        Ok(Done::Differs) => failure::FAILED.into(),
        Ok(Done::Interrupted) => failure::INTERRUPTED.into(),
        // The reader of our output has gone, as in `apr inspect model | head`: nothing to tell anyone.
        Err(Failure { error, .. }) if failure::is_broken_pipe(&error) => 0.into(),
        Err(Failure { code, error }) => {
            // Messages of the engine's errors name their causes themselves.
            print::say(format_args!("error: {error}"));
            code.into()
        }
    }
}
