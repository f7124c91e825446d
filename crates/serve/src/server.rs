//! Sockets: accepts connections under limits, and stops in order.

use crate::app::{App, router};
use crate::generator::Generator;
use crate::job::Workshop;
use crate::metrics::Metrics;
use crate::model::ServedModel;
use crate::options::ServeOptions;
use crate::registry::Registry;
use hyper::server::conn::http1;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::server::graceful::GracefulShutdown;
use hyper_util::service::TowerToHyperService;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;
use tokio::net::TcpListener;
use tokio::sync::Semaphore;

/// Why the server cannot run.
#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    /// The address is taken, or not ours.
    #[error("cannot listen on {address}: {source}")]
    Listen {
        /// The address that was asked for.
        address: SocketAddr,
        /// What the operating system said.
        source: std::io::Error,
    },
    /// An option is not usable.
    #[error("{name}: {reason}")]
    Option {
        /// The option.
        name: &'static str,
        /// What was found and expected.
        reason: String,
    },
    /// The runtime or the signal handlers could not be set up.
    #[error("cannot start the server: {0}")]
    Start(#[from] std::io::Error),
}

/// Serves until SIGINT or SIGTERM, then drains. Blocks; makes its own runtime.
///
/// # Errors
/// [`ServeError`] before the first request; never because of one.
pub fn run(options: ServeOptions, model: ServedModel, generator: Arc<dyn Generator>) -> Result<(), ServeError> {
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().thread_name("serve").build()?;
    let drain = options.drain;
    let result = runtime.block_on(async {
        let server = Server::bind(options, model, generator).await?;
        tracing::info!(address = %server.address()?, "listening");
        let stop = stop_signal()?;
        server.serve(stop).await;
        Ok(())
    });
    // Blocking work of cancelled requests (rendering, compiling) is bounded by its own limits; do not wait for it.
    runtime.shutdown_timeout(drain.min(Duration::from_secs(1)));
    result
}

/// Resolves at SIGINT or SIGTERM.
fn stop_signal() -> Result<impl Future<Output = ()> + Send, std::io::Error> {
    #[cfg(unix)]
    {
        use tokio::signal::unix::{SignalKind, signal};
        let mut terminate = signal(SignalKind::terminate())?;
        let mut interrupt = signal(SignalKind::interrupt())?;
        Ok(async move {
            tokio::select! {
                _ = terminate.recv() => {}
                _ = interrupt.recv() => {}
            }
        })
    }
    #[cfg(not(unix))]
    Ok(async {
        // Without the handler there is no other way to stop than the hard one.
        if tokio::signal::ctrl_c().await.is_err() {
            std::future::pending::<()>().await;
        }
    })
}

/// A server that is bound to its address and not yet serving: for callers with a runtime of their own, such as tests.
pub struct Server {
    listener: TcpListener,
    app: Arc<App>,
}

impl Server {
    /// Checks the options and binds the address.
    ///
    /// # Errors
    /// [`ServeError::Option`] and [`ServeError::Listen`].
    pub async fn bind(
        options: ServeOptions,
        model: ServedModel,
        generator: Arc<dyn Generator>,
    ) -> Result<Server, ServeError> {
        check(&options)?;
        let address = options.address;
        let listener = TcpListener::bind(address).await.map_err(|source| ServeError::Listen { address, source })?;
        if !address.ip().is_loopback() && options.api_keys.is_empty() {
            tracing::warn!(%address, "anybody who reaches this address can use the model: no API key is set");
        }
        let workshop = Workshop {
            model: Arc::new(model),
            generator,
            metrics: Arc::new(Metrics::new()),
            registry: Arc::new(Registry::default()),
        };
        Ok(Server { listener, app: Arc::new(App::new(workshop, options)) })
    }

    /// The address, with the port that the system chose where 0 was asked for.
    ///
    /// # Errors
    /// What the operating system said.
    pub fn address(&self) -> Result<SocketAddr, std::io::Error> {
        self.listener.local_addr()
    }

    /// Serves until `stop` resolves, then lets running requests finish for as long as the options say.
    pub async fn serve(self, stop: impl Future<Output = ()> + Send) {
        let limits = &self.app.options.http;
        let mut http = http1::Builder::new();
        http.timer(TokioTimer::new())
            .header_read_timeout(limits.header_timeout)
            .max_buf_size(limits.max_header_bytes)
            .max_headers(limits.max_headers);
        let service = TowerToHyperService::new(router(Arc::clone(&self.app)));
        let graceful = GracefulShutdown::new();
        let connections = Arc::new(Semaphore::new(limits.max_connections));
        let mut stop = std::pin::pin!(stop);
        loop {
            let accept = async {
                // Closed never: the semaphore lives as long as this loop.
                let permit = Arc::clone(&connections).acquire_owned().await;
                (self.listener.accept().await, permit)
            };
            let (accepted, permit) = tokio::select! {
                biased;
                () = &mut stop => break,
                accepted = accept => accepted,
            };
            let socket = match accepted {
                Ok((socket, _)) => socket,
                Err(error) => {
                    // Out of file descriptors, most likely: give the others time to end.
                    tracing::warn!(%error, "cannot accept a connection");
                    tokio::time::sleep(Duration::from_millis(50)).await;
                    continue;
                }
            };
            // Tokens are small and must not wait for one another.
            if let Err(error) = socket.set_nodelay(true) {
                tracing::debug!(%error, "no TCP_NODELAY");
            }
            let connection = graceful.watch(http.serve_connection(TokioIo::new(socket), service.clone()));
            tokio::spawn(async move {
                if let Err(error) = connection.await {
                    tracing::debug!(%error, "connection ended");
                }
                drop(permit);
            });
        }
        self.app.drain();
        drop(self.listener);
        let num_requests = self.app.workshop.registry.len();
        tracing::info!(requests = num_requests, seconds = self.app.options.drain.as_secs_f64(), "draining");
        if tokio::time::timeout(self.app.options.drain, graceful.shutdown()).await.is_err() {
            let num_requests = self.app.workshop.registry.len();
            tracing::warn!(requests = num_requests, "drain time is over, requests are cancelled");
            self.app.workshop.registry.cancel_all();
            // Time for their last frames.
            tokio::time::sleep(Duration::from_millis(200)).await;
        }
    }
}

fn check(options: &ServeOptions) -> Result<(), ServeError> {
    let refuse = |name: &'static str, reason: &str| Err(ServeError::Option { name, reason: reason.to_owned() });
    if options.http.max_header_bytes < 8192 {
        return refuse("max_header_bytes", "found less than 8192, expected at least that");
    }
    if options.api_keys.iter().any(|key| key.trim().is_empty()) {
        return refuse("api_keys", "found an empty key, expected at least one character");
    }
    if options.heartbeat.is_zero() {
        return refuse("heartbeat", "found 0, expected a time between heartbeats");
    }
    if options.http.max_connections == 0 || options.http.max_requests == 0 {
        return refuse("max_connections", "found 0, expected room for at least one");
    }
    Ok(())
}
