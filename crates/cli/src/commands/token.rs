//! `virtward token`: tokens for the API over HTTPS.

use virtward_api::{NewToken, Role, Token, TokenCreated};
use virtward_model::Seconds;

use crate::{
    app::App,
    commands::job::escaped,
    daemon,
    exit::Failure,
    out,
    render::{self, Table},
};

/// The verbs.
#[derive(Debug, clap::Subcommand)]
pub enum Command {
    /// Make a token; its secret is shown once
    Create(CreateArgs),
    /// List tokens
    List(ListArgs),
    /// Revoke a token, and end what was begun with it
    Revoke(RevokeArgs),
}

/// Arguments of `token create`.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
viewer sees; operator also starts and cancels jobs; admin also changes policies
and tokens. The secret is printed on standard output and kept nowhere.

Examples:
  virtward token create grafana --role viewer --expires 365d
  virtward token create shop-team --role operator --vm-tag shop
  virtward token create me --role admin --json | jq -r .secret")]
pub struct CreateArgs {
    /// What it is for, unique
    pub name: String,
    /// What it may do
    #[arg(long, value_enum, default_value = "viewer")]
    pub role: RoleArg,
    /// Restore only VMs with this tag; may be repeated
    #[arg(long = "vm-tag", value_name = "TAG")]
    pub vm_tags: Vec<String>,
    /// How long it is valid, such as 12h or 90d
    #[arg(long, value_name = "TIME", default_value = "90d")]
    pub expires: Seconds,
}

/// `--role`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
#[allow(missing_docs)]
pub enum RoleArg {
    Viewer,
    Operator,
    Admin,
}

/// Arguments of `token list`.
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:\n  virtward token list --json")]
pub struct ListArgs {}

/// Arguments of `token revoke`.
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:\n  virtward token revoke grafana")]
pub struct RevokeArgs {
    /// Name or id
    pub token: String,
}

/// Runs one verb.
pub async fn run(app: &App, command: &Command) -> Result<(), Failure> {
    let client = daemon::client(app);
    match command {
        Command::Create(args) => {
            let new = NewToken {
                name: args.name.clone(),
                role: match args.role {
                    RoleArg::Viewer => Role::Viewer,
                    RoleArg::Operator => Role::Operator,
                    RoleArg::Admin => Role::Admin,
                },
                vm_tags: args.vm_tags.clone(),
                expires_in_s: Some(args.expires.0),
            };
            let made: TokenCreated = client.post("/api/v1/tokens", &new, None).await?;
            if app.json {
                return out::json(&made);
            }
            let until = made.token.expires.map(render::local_time).unwrap_or_else(|| "for ever".into());
            app.progress.note(&format!("token {} ({}), valid until {until}", made.token.name, made.token.id));
            out::text(&format!("{}\n", made.secret.unwrap_or_default()))
        }
        Command::List(_) => {
            let tokens: Vec<Token> = client.get("/api/v1/tokens").await?;
            if app.json {
                return out::json(&tokens);
            }
            let mut table = Table::new(&["NAME", "ID", "ROLE", "VM TAGS", "CREATED", "BY", "EXPIRES"]);
            for token in tokens {
                table.row([
                    token.name,
                    token.id,
                    render::word(&token.role),
                    token.vm_tags.join(","),
                    render::local_time(token.created),
                    token.created_by,
                    token.expires.map(render::local_time).unwrap_or_default(),
                ]);
            }
            out::text(&table.render(out::stdout_is_terminal()))
        }
        Command::Revoke(args) => {
            client.delete(&format!("/api/v1/tokens/{}", escaped(&args.token))).await?;
            app.progress.note(&format!("token {} is revoked", args.token));
            Ok(())
        }
    }
}
