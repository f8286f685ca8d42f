//! Answers: JSON, or a problem.

use axum::{
    body::{Body, Bytes},
    http::{StatusCode, header},
    response::{IntoResponse, Response},
};
use serde::Serialize;
use virtward_api::{Code, PROBLEM_JSON, Problem};

/// Result of a handler.
pub type Answer<T = Json> = std::result::Result<T, Failed>;

/// A problem on its way out.
#[derive(Debug)]
pub struct Failed(pub Problem);

impl From<Problem> for Failed {
    fn from(problem: Problem) -> Self {
        Self(problem)
    }
}

impl IntoResponse for Failed {
    fn into_response(self) -> Response {
        if self.0.code == Code::Internal {
            tracing::error!(detail = self.0.detail, "a request met a defect");
        }
        let status = StatusCode::from_u16(self.0.status).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
        let body = serde_json::to_vec(&self.0).unwrap_or_default();
        (status, [(header::CONTENT_TYPE, PROBLEM_JSON)], body).into_response()
    }
}

/// JSON with a status.
#[derive(Debug)]
pub struct Json(StatusCode, Bytes);

impl IntoResponse for Json {
    fn into_response(self) -> Response {
        (self.0, [(header::CONTENT_TYPE, "application/json")], Body::from(self.1)).into_response()
    }
}

/// 200 with a value.
pub fn ok(value: &impl Serialize) -> Answer {
    with(StatusCode::OK, value)
}

/// A value with another status.
pub fn with(status: StatusCode, value: &impl Serialize) -> Answer {
    match serde_json::to_vec(value) {
        Ok(body) => Ok(Json(status, body.into())),
        Err(error) => Err(Problem::new(Code::Internal, format!("the answer cannot be written: {error}")).into()),
    }
}
