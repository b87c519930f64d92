"""Describe the JSON interface as OpenAPI 3.1, for `GET /api`. docs/serve.md describes it in prose."""

from pylorus import __version__
from pylorus.deploy.app.options import ServeOptions
from pylorus.deploy.app.upload import FIELD
from pylorus.deploy.load import Bundle

Schema = dict[str, object]

TEXT: Schema = {"type": "string"}
NUMBER: Schema = {"type": "number"}
TRUTH: Schema = {"type": "boolean"}
ERRORS = {
    "400": "The form is malformed or incomplete.",
    "401": "The password is missing or wrong (HTTP Basic, any user name).",
    "403": "The request came from another site's page.",
    "408": "The files took too long to arrive.",
    "413": "Too many files, or too many bytes in total.",
    "415": "The body is not multipart/form-data.",
    "421": "The Host header names another server.",
    "503": "Too many requests at once; retry after Retry-After seconds.",
}


def build_openapi(bundle: Bundle, options: ServeOptions) -> Schema:
    """Return the OpenAPI description of this server's interface."""
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "Pylorus: predictions of a trained model",
            "version": __version__,
            "description": bundle.description.intended_use,
        },
        "paths": {
            "/api/predict": {"post": _build_predict_operation(options)},
            "/api/model": {"get": _build_get_operation("The model that this server runs", "Model")},
            "/health": {"get": {**_build_get_operation("Server status, version and bundle", "Health"), "security": []}},
        },
        "components": {
            "schemas": {
                "Row": _build_row_schema(bundle),
                "Answer": _build_answer_schema(),
                "Model": _build_model_schema(),
                "Health": _build_health_schema(),
            },
            "securitySchemes": {"password": {"type": "http", "scheme": "basic"}},
        },
        "security": [{}] if options.password_file is None else [{"password": []}],
    }


def _build_predict_operation(options: ServeOptions) -> Schema:
    form = {
        "type": "object",
        "required": [FIELD],
        "properties": {
            FIELD: {
                "type": "array",
                "minItems": 1,
                "maxItems": options.max_images,
                "items": {"type": "string", "contentMediaType": "application/octet-stream"},
                "description": f"JPEG, PNG, BMP, TIFF, WebP or DICOM, at most {options.most_bytes:,} bytes each.",
            }
        },
    }
    descriptions = {
        "image": "With 1, each row has the preprocessed image as a JPEG (data: URL).",
        "heat_map": "With 1, each row has that image under the heat map of its predicted class, if available.",
    }
    return {
        "summary": "Classify images",
        "parameters": [
            {"name": name, "in": "query", "description": text, "schema": {"type": "string", "enum": ["0", "1"]}}
            for name, text in descriptions.items()
        ],
        "requestBody": {"required": True, "content": {"multipart/form-data": {"schema": form}}},
        "responses": {
            "200": _build_content("One row per file, in the order of the files", "Answer"),
            **{status: {"description": text} for status, text in ERRORS.items()},
        },
    }


def _build_row_schema(bundle: Bundle) -> Schema:
    names, decision_class = bundle.description.short_names, bundle.description.decision.class_name
    return {
        "type": "object",
        "required": ["file", "error"],
        "description": "If error is not empty, the row holds only file and error.",
        "properties": {
            "file": TEXT,
            "error": {**TEXT, "description": "Why there is no answer for this file; empty if there is one."},
            "predicted": {"type": "string", "enum": list(names)},
            "probability": {
                "type": "object",
                "properties": dict.fromkeys(names, NUMBER),
                "description": "Calibrated probability of each class, 0 to 1.",
            },
            "decision": {"type": "string", "enum": [decision_class, f"not {decision_class}"]},
            "abstain": {**TRUTH, "description": "Whether the model abstains: this answer must not be used."},
            "why": {"type": "string", "enum": ["", "unsure", "unlike"]},
            "prediction_set": {
                "type": "array",
                "items": {"type": "string", "enum": list(names)},
                "description": "Short class names; only if the bundle has prediction sets.",
            },
            "unlikeness": {**NUMBER, "description": "Distance from the training images, 0 to 2."},
            "image": TEXT,
            "heat_map": TEXT,
        },
    }


def _build_answer_schema() -> Schema:
    rows = {"type": "array", "items": {"$ref": "#/components/schemas/Row"}}
    return _build_object_schema(bundle=TEXT, intended_use=TEXT, results=rows)


def _build_model_schema() -> Schema:
    names: Schema = {"type": "array", "items": TEXT}
    return _build_object_schema(
        bundle=TEXT,
        architecture=TEXT,
        classes=names,
        short_names={**names, "description": "Short class names used in answers, in the order of classes."},
        decision=_build_object_schema(**{"class": TEXT, "threshold": {"type": ["number", "null"]}}),
        prediction_sets={
            "oneOf": [{"type": "null"}, _build_object_schema(coverage=NUMBER)],
            "description": "Null if the bundle has none.",
        },
        abstention=_build_object_schema(unlike_above=NUMBER, unsure_below=NUMBER),
        limits=_build_object_schema(most_bytes=NUMBER, most_files=NUMBER),
        no_heat_maps={**TEXT, "description": "Why there are no heat maps; empty if there are."},
        intended_use=TEXT,
    )


def _build_health_schema() -> Schema:
    return _build_object_schema(status=TEXT, bundle=TEXT, version=TEXT)


def _build_object_schema(**properties: object) -> Schema:
    return {"type": "object", "required": list(properties), "properties": properties}


def _build_get_operation(summary: str, schema: str) -> Schema:
    return {"summary": summary, "responses": {"200": _build_content(summary, schema)}}


def _build_content(text: str, schema: str) -> Schema:
    return {
        "description": text,
        "content": {"application/json": {"schema": {"$ref": f"#/components/schemas/{schema}"}}},
    }
