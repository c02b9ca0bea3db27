//! `apr serve`: answers over HTTP. stderr says where; nothing is written to stdout.

use std::net::IpAddr;
use std::num::NonZeroUsize;

use apr_server::{Model, Server, Settings, limits};

use crate::failure::{Done, Result};
use crate::options::LoadArgs;
use crate::print::say;

#[derive(clap::Args)]
pub struct Args {
    #[command(subcommand)]
    command: Command,
}

#[derive(clap::Subcommand)]
enum Command {
    /// Answer requests in OpenAI's form until the process is told to stop.
    #[command(after_help = crate::EXIT_CODES)]
    Run(RunArgs),
}

#[derive(clap::Args)]
struct RunArgs {
    #[command(flatten)]
    load: LoadArgs,
    /// Port to listen on; 0 takes any that is free
    #[arg(long, env = "APR_PORT", default_value_t = 8080, value_name = "PORT")]
    port: u16,
    /// Address to listen on; there are no keys yet, so whoever reaches it is answered
    #[arg(long, env = "APR_HOST", default_value = "127.0.0.1", value_name = "HOST")]
    host: String,
    /// Answers in the making at a time
    #[arg(long, env = "APR_PARALLEL", default_value = "8", value_name = "N")]
    parallel: NonZeroUsize,
    /// Requests that wait for one of them to end; with more, clients are told to come back
    #[arg(long, env = "APR_QUEUE", default_value_t = 64, value_name = "N")]
    queue: usize,
    /// Another name by which clients may ask for the model; may be given several times
    #[arg(long, value_name = "NAME")]
    alias: Vec<String>,
}

pub fn run(args: Args) -> Result<Done> {
    match args.command {
        Command::Run(args) => serve(args),
    }
}

fn serve(args: RunArgs) -> Result<Done> {
    let server = Server::bind(&args.host, args.port, Settings::default())?;
    let engine = args.load.load()?;
    let limits = limits(&engine, args.parallel.get(), args.queue);
    server.answer_with(Model::start(engine, limits, args.alias)?);
    if !is_loopback(server.addr().ip()) {
        say("note: whoever reaches this address is answered; there are no keys yet");
    }
    say(format_args!("listening on http://{}", server.addr()));
    let told = |n| match n {
        0 => say("stopping"),
        n => say(format_args!("stopping when {n} running requests have ended; a second signal ends them at once")),
    };
    server.run(told)?;
    Ok(Done::Ok)
}

fn is_loopback(ip: IpAddr) -> bool {
    ip.to_canonical().is_loopback()
}
