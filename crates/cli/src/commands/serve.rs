//! `apr serve`: answers over HTTP. stderr says where; nothing is written to stdout.

use std::net::SocketAddr;
use std::num::NonZeroUsize;
use std::path::PathBuf;

use apr_server::{Keys, Model, Server, Settings, Tls, limits};

use crate::failure::{Done, Result, usage};
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
    /// Address to listen on; any but this machine's own (127.0.0.1) needs --api-key-file or --insecure-no-auth
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
    #[command(flatten)]
    access: AccessArgs,
}

/// Who is answered.
#[derive(clap::Args)]
#[command(next_help_heading = "Access")]
struct AccessArgs {
    /// Keys of those who are answered, one a line; SIGHUP reads it again. Only /health and the page's own files need none
    #[arg(long, env = "APR_API_KEY_FILE", value_name = "FILE")]
    api_key_file: Option<PathBuf>,
    /// Keys of those who may look inside (x-apr-trace), one a line; they may do all else too
    #[arg(long, env = "APR_ADMIN_KEY_FILE", value_name = "FILE")]
    admin_key_file: Option<PathBuf>,
    /// Answer whoever reaches the address, without keys
    #[arg(long, env = "APR_INSECURE_NO_AUTH", conflicts_with = "api_key_file")]
    insecure_no_auth: bool,
    /// Serve HTTPS with this certificate (PEM, those that vouch for it behind it); SIGHUP reads it again
    #[arg(long, env = "APR_TLS_CERT", value_name = "FILE", requires = "tls_key")]
    tls_cert: Option<PathBuf>,
    /// The certificate's private key (PEM)
    #[arg(long, env = "APR_TLS_KEY", value_name = "FILE", requires = "tls_cert")]
    tls_key: Option<PathBuf>,
}

impl AccessArgs {
    fn keys(&self) -> Result<Keys> {
        Ok(Keys::read(self.api_key_file.as_deref(), self.admin_key_file.as_deref())?)
    }

    fn tls(&self) -> Result<Option<Tls>> {
        let files = self.tls_cert.as_ref().zip(self.tls_key.as_ref());
        Ok(files.map(|(cert, key)| Tls::read(cert, key)).transpose()?)
    }

    /// Refuses an address that others reach where nobody asks them for a key.
    fn check(&self, addr: SocketAddr) -> Result<()> {
        if addr.ip().to_canonical().is_loopback() || self.api_key_file.is_some() || self.insecure_no_auth {
            return Ok(());
        }
        Err(usage(format_args!(
            "{} can be reached from other machines, and there are no keys; give some with --api-key-file FILE, or answer \
             everybody with --insecure-no-auth",
            addr.ip()
        )))
    }

    /// Reads files of secrets again. Those in use stay where one is no good.
    fn reload(&self, server: &Server) {
        match self.keys().and_then(|keys| Ok((keys, self.tls()?))) {
            Ok((keys, tls)) => {
                server.set_keys(keys);
                tls.into_iter().for_each(|tls| server.set_tls(tls));
                say("read keys and certificate again");
            }
            Err(e) => say(format_args!("warning: keys and certificate stay as they are: {}", e.error)),
        }
    }
}

pub fn run(args: Args) -> Result<Done> {
    match args.command {
        Command::Run(args) => serve(args),
    }
}

fn serve(args: RunArgs) -> Result<Done> {
    let settings = Settings { keys: args.access.keys()?, tls: args.access.tls()?, ..Settings::default() };
    let server = Server::bind(&args.host, args.port, settings)?;
    args.access.check(server.addr())?;
    let engine = args.load.load()?;
    let limits = limits(&engine, args.parallel.get(), args.queue);
    server.answer_with(Model::start(engine, limits, args.alias)?);
    let scheme = if args.access.tls_cert.is_some() { "https" } else { "http" };
    say(format_args!("listening on {scheme}://{}", server.addr()));
    let told = |n| match n {
        0 => say("stopping"),
        n => say(format_args!("stopping when {n} running requests have ended; a second signal ends them at once")),
    };
    server.run(told, |server| args.access.reload(server))?;
    Ok(Done::Ok)
}
