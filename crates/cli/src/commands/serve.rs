//! `apr serve`: answers over HTTP. stderr says where, and has a line for each request; nothing is written to stdout.

mod access;
mod log;
mod plan;
mod supervisor;

use std::num::{NonZeroU64, NonZeroUsize};
use std::path::PathBuf;
use std::time::Duration;

use apr_server::{Model, Server, Settings, SystemLines, limits};

use crate::failure::{Done, Result, usage};
use crate::options::LoadArgs;
use access::AccessArgs;
use log::LogArgs;
use supervisor::{News, tell};

#[derive(clap::Args)]
pub struct Args {
    #[command(subcommand)]
    command: Command,
}

#[derive(clap::Subcommand)]
enum Command {
    /// Answer requests in OpenAI's form until the process is told to stop.
    #[command(after_help = crate::EXIT_CODES)]
    Run(Box<RunArgs>),
    /// Say what memory and speed a server would have, from the model's header alone.
    #[command(after_help = crate::EXIT_CODES)]
    Plan(plan::PlanArgs),
}

#[derive(clap::Args)]
struct RunArgs {
    #[command(flatten)]
    load: LoadArgs,
    /// Port to listen on; 0 takes any that is free
    #[arg(long, env = "APR_PORT", default_value_t = 8080, value_name = "PORT")]
    port: u16,
    /// Address to listen on; any but this machine's own (127.0.0.1) needs --api-key-file or --insecure-no-auth
    #[arg(long, env = "APR_HOST", default_value = "127.0.0.1", value_name = "HOST")]
    host: String,
    /// Another name by which clients may ask for the model; may be given several times
    #[arg(long, env = "APR_ALIAS", value_name = "NAME", value_delimiter = ',')]
    alias: Vec<String>,
    /// Leave out lines of system messages that this regular expression matches, so that requests that differ in nothing else
    /// share what was computed; may be given several times
    #[arg(long, env = "APR_DROP_SYSTEM_LINE", value_name = "REGEX")]
    drop_system_line: Vec<String>,
    #[command(flatten)]
    limits: LimitArgs,
    #[command(flatten)]
    inside: InsideArgs,
    #[command(flatten)]
    access: AccessArgs,
    #[command(flatten)]
    log: LogArgs,
}

/// How much is taken on, and how long it may take.
#[derive(clap::Args)]
#[command(next_help_heading = "Limits")]
struct LimitArgs {
    /// Answers in the making at a time
    #[arg(long, env = "APR_PARALLEL", default_value = "8", value_name = "N")]
    parallel: NonZeroUsize,
    /// Requests that wait for one of them to end; with more, clients are told to come back
    #[arg(long, env = "APR_QUEUE", default_value_t = 64, value_name = "N")]
    queue: usize,
    /// Seconds that a request may take, waiting and answering; by default as long as it takes
    #[arg(long, env = "APR_REQUEST_TIMEOUT", value_name = "SECONDS", value_parser = seconds)]
    request_timeout: Option<Duration>,
    /// Seconds that running answers are given after SIGTERM or Ctrl-C; what is left then is ended where it is
    #[arg(long, env = "APR_SHUTDOWN_TIMEOUT", default_value = "30", value_name = "SECONDS", value_parser = seconds)]
    shutdown_timeout: Duration,
}

/// What of the passes that serve is looked at.
#[derive(clap::Args)]
#[command(next_help_heading = "Looking inside")]
struct InsideArgs {
    /// Folder for the traces that requests with x-apr-trace: save ask for, with an administrator's key
    #[arg(long, env = "APR_TRACE_DIR", value_name = "DIR", requires = "admin_key_file")]
    trace_dir: Option<PathBuf>,
    /// Largest such trace, in MiB
    #[arg(long, env = "APR_TRACE_LIMIT", default_value_t = 4096, value_name = "MIB")]
    trace_limit: u64,
    /// Compute every N-th answer of at most 128 tokens, prompt included, once more on the reference while nobody is answered, and
    /// count how far its next tokens are from what was served
    #[arg(long, env = "APR_SHADOW_EVERY", value_name = "N")]
    shadow_every: Option<NonZeroU64>,
}

pub fn run(args: Args) -> Result<Done> {
    match args.command {
        Command::Run(args) => serve(*args),
        Command::Plan(args) => plan::run(args),
    }
}

fn serve(args: RunArgs) -> Result<Done> {
    args.log.start();
    let system_lines = SystemLines::matching(&args.drop_system_line)
        .map_err(|e| usage(format_args!("--drop-system-line: {}", last_line(&e.to_string()))))?;
    let server = Server::bind(&args.host, args.port, args.settings()?)?;
    args.access.check(server.addr())?;
    plan::check(&args.load, args.limits.parallel)?;
    let engine = args.load.load()?;
    let limits = limits(&engine, args.limits.parallel.get(), args.limits.queue);
    if !args.drop_system_line.is_empty() {
        args.log.say(format_args!("lines of system messages that match {:?} are left out", args.drop_system_line));
    }
    let model = Model::start_with(engine, limits, args.alias, args.inside.shadow_every)?;
    server.answer_with(model.without(system_lines));
    let (access, log, addr) = (&args.access, &args.log, server.addr());
    let ready = || {
        let scheme = if access.tls_cert.is_some() { "https" } else { "http" };
        log.say(format_args!("listening on {scheme}://{addr}"));
        tell(News::Ready);
    };
    let told = |n| {
        tell(News::Stopping);
        match n {
            0 => log.say(format_args!("stopping")),
            n => log
                .say(format_args!("stopping when {n} running requests have ended; a second signal ends them at once")),
        }
    };
    let reload = |server: &Server| {
        tell(News::Reloading);
        access.reload(server, log);
        tell(News::Ready);
    };
    server.run(ready, told, reload)?;
    Ok(Done::Ok)
}

impl RunArgs {
    fn settings(&self) -> Result<Settings> {
        if let Some(dir) = &self.inside.trace_dir {
            std::fs::create_dir_all(dir).map_err(|e| usage(format_args!("--trace-dir {}: {e}", dir.display())))?;
        }
        Ok(Settings {
            keys: self.access.keys()?,
            tls: self.access.tls()?,
            cors_origins: self.access.cors_origin.clone(),
            allowed_hosts: self.access.allowed_host.clone(),
            trace_dir: self.inside.trace_dir.clone(),
            trace_bytes: self.inside.trace_limit.saturating_mul(1 << 20),
            request_time: self.limits.request_timeout,
            drain_time: self.limits.shutdown_timeout,
            ..Settings::default()
        })
    }
}

/// The reason at the end of an error that shows the whole expression first.
fn last_line(error: &str) -> &str {
    let line = error.lines().last().unwrap_or_default();
    line.strip_prefix("error: ").unwrap_or(line)
}

/// Seconds, or a part of one.
fn seconds(text: &str) -> std::result::Result<Duration, String> {
    let s = text.parse::<f64>().ok().filter(|s| *s >= 0.0).and_then(|s| Duration::try_from_secs_f64(s).ok());
    s.filter(|s| *s < YEAR).ok_or_else(|| "expected a number of seconds".to_string())
}

/// More is taken for a mistake, and clocks could not add it.
const YEAR: Duration = Duration::from_secs(365 * 86_400);
