//! Passes the requests of a connection from hyper to the router, and the responses back.

use super::activity::Activity;
use super::progress::{self, Progress, ResponseBody};
use axum::Router;
use axum::body::{Bytes, HttpBody};
use hyper::body::Incoming;
use hyper::body::{Frame, SizeHint};
use hyper::service::Service;
use hyper::{Request, Response, Version};
use std::convert::Infallible;
use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use tower::ServiceExt;

/// Handles the requests of one connection.
pub(super) struct ConnectionService {
    pub router: Router,
    pub activity: Arc<Activity>,
    /// Progress of the response, of which there is only one at a time with HTTP/1.
    pub progress: Arc<Progress>,
}

impl Service<Request<Incoming>> for ConnectionService {
    type Response = Response<ResponseBody>;
    type Error = Infallible;
    type Future = Pin<Box<dyn Future<Output = Result<Response<ResponseBody>, Infallible>> + Send>>;

    fn call(&self, request: Request<Incoming>) -> Self::Future {
        let open = self.activity.request();
        self.activity.uploading(!request.body().is_end_stream());
        let activity = Arc::clone(&self.activity);
        let request = request.map(|body| RequestBody { body, activity });
        let router = self.router.clone();
        let progress = Arc::clone(&self.progress);
        Box::pin(async move {
            if request.version() == Version::HTTP_2 {
                // If the stream was reset already, it is dropped here, before any work is done
                // for it.
                tokio::task::yield_now().await;
            }
            let response = router.oneshot(request).await?;
            let progress = progress::of_stream().unwrap_or(progress);
            Ok(response.map(|body| ResponseBody::new(body, progress, open)))
        })
    }
}

/// A request's body, which reports when it has arrived. If it is dropped before that, the rest
/// of it is still to come from the client.
struct RequestBody {
    body: Incoming,
    activity: Arc<Activity>,
}

impl HttpBody for RequestBody {
    type Data = Bytes;
    type Error = hyper::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, hyper::Error>>> {
        let frame = ready!(Pin::new(&mut self.body).poll_frame(context));
        if self.body.is_end_stream() || !matches!(frame, Some(Ok(_))) {
            self.activity.uploading(false);
        }
        Poll::Ready(frame)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}
