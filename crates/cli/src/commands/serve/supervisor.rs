//! What a service manager is told (sd_notify(3)): that the model answers, and that the server stops. Without one nobody is told.

/// News for the service manager.
#[derive(Clone, Copy, Debug)]
pub enum News {
    Ready,
    Reloading,
    Stopping,
}

/// Tells it.
#[cfg(unix)]
pub fn tell(news: News) {
    use sd_notify::NotifyState;

    // A manager that cannot be reached notices by itself that it hears nothing.
    _ = match news {
        News::Ready => sd_notify::notify(&[NotifyState::Ready]),
        News::Stopping => sd_notify::notify(&[NotifyState::Stopping]),
        News::Reloading => {
            NotifyState::monotonic_usec_now().and_then(|now| sd_notify::notify(&[NotifyState::Reloading, now]))
        }
    };
}

#[cfg(not(unix))]
pub fn tell(_: News) {}
