// Explain a photograph, score the map, and print the details of an error. The example uses only the files in proto/.
//
//   make
//   build/explain dog.jpg 127.0.0.1:50051 [METHOD]
//
// CAMSERVE_TOKEN is sent as a bearer token. CAMSERVE_CA names a PEM file and enables TLS.

#include <algorithm>
#include <chrono>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <iostream>
#include <iterator>
#include <memory>
#include <string>
#include <vector>

#include <google/protobuf/struct.pb.h>
#include <google/protobuf/util/json_util.h>
#include <grpcpp/grpcpp.h>

#include "camserve/v1/explain.grpc.pb.h"
#include "google_rpc.pb.h"

namespace pb = camserve::v1;
using google::protobuf::Struct;

constexpr int kMessageBytes = 64 * 1024 * 1024;  // the limit of the server; gRPC's default is too small for photographs
constexpr char kServiceConfig[] = R"({"methodConfig": [{
  "name": [{"service": "camserve.v1.ExplainService"}],
  "retryPolicy": {
    "maxAttempts": 4, "initialBackoff": "0.1s", "maxBackoff": "2s", "backoffMultiplier": 4,
    "retryableStatusCodes": ["UNAVAILABLE", "RESOURCE_EXHAUSTED"]
  }
}]})";

std::string Read(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  if (!file) {
    std::cerr << "cannot read " << path << "\n";
    std::exit(2);
  }
  return {std::istreambuf_iterator<char>(file), {}};
}

std::unique_ptr<pb::ExplainService::Stub> Connect(const std::string& address) {
  std::shared_ptr<grpc::ChannelCredentials> credentials = grpc::InsecureChannelCredentials();
  if (const char* ca = std::getenv("CAMSERVE_CA")) {
    grpc::SslCredentialsOptions options;
    options.pem_root_certs = Read(ca);
    credentials = grpc::SslCredentials(options);
  }
  grpc::ChannelArguments arguments;
  arguments.SetMaxSendMessageSize(kMessageBytes);
  arguments.SetMaxReceiveMessageSize(kMessageBytes);
  arguments.SetServiceConfigJSON(kServiceConfig);
  return pb::ExplainService::NewStub(grpc::CreateCustomChannel(address, credentials, arguments));
}

// A context must not be used for a second call.
std::unique_ptr<grpc::ClientContext> Context() {
  auto context = std::make_unique<grpc::ClientContext>();
  context->set_deadline(std::chrono::system_clock::now() + std::chrono::seconds(300));
  if (const char* token = std::getenv("CAMSERVE_TOKEN")) {
    context->AddMetadata("authorization", std::string("Bearer ") + token);
  }
  return context;
}

// Return the numbers of a Tensor in row-major order. The server sends float32 in little-endian order.
std::vector<float> Floats(const pb::Tensor& tensor) {
  std::vector<float> values(tensor.data().size() / sizeof(float));
  std::memcpy(values.data(), tensor.data().data(), tensor.data().size());
  return values;
}

void Print(const std::string& what, const Struct& value) {
  std::string json;
  if (google::protobuf::util::MessageToJsonString(value, &json).ok()) std::cout << what << ": " << json << "\n";
}

Struct Scores(const pb::SaliencyMap& map) {
  Struct scores;
  for (const auto& score : map.scores()) (*scores.mutable_fields())[score.metric()].set_number_value(score.value());
  return scores;
}

// Return the code and the message of an error, and the details that the server adds to it as google.rpc.Status.
Struct Describe(const grpc::Status& error) {
  Struct described;
  auto& fields = *described.mutable_fields();
  fields["code"].set_number_value(error.error_code());
  fields["message"].set_string_value(error.error_message());
  google::rpc::Status status;
  status.ParseFromString(error.error_details());
  for (const auto& detail : status.details()) {
    google::rpc::ErrorInfo info;
    google::rpc::BadRequest invalid;
    google::rpc::RequestInfo request;
    if (detail.UnpackTo(&info)) fields["reason"].set_string_value(info.reason());
    if (detail.UnpackTo(&request)) fields["request_id"].set_string_value(request.request_id());
    if (detail.UnpackTo(&invalid) && invalid.field_violations_size() > 0) {
      fields["field"].set_string_value(invalid.field_violations(0).field());
    }
  }
  return described;
}

int main(int argc, char** argv) {
  if (argc < 2) {
    std::cerr << "usage: explain IMAGE [HOST:PORT] [METHOD]\n";
    return 2;
  }
  auto stub = Connect(argc > 2 ? argv[2] : "127.0.0.1:50051");
  pb::ExplainRequest request;
  request.mutable_image()->set_encoded(Read(argv[1]));
  request.mutable_method()->set_name(argc > 3 ? argv[3] : "grad-cam");
  request.add_metrics()->set_name("average-drop");
  pb::ExplainResponse explained;
  if (auto status = stub->Explain(Context().get(), request, &explained); !status.ok()) {
    Print("failed", Describe(status));
    return 1;
  }

  const pb::SaliencyMap& map = explained.maps(0);
  Struct target, shape;
  (*target.mutable_fields())["label"].set_string_value(map.target().label());
  (*target.mutable_fields())["probability"].set_number_value(map.target().probability());
  Print("target", target);
  std::vector<float> values = Floats(map.saliency());
  auto& sizes = *(*shape.mutable_fields())["shape"].mutable_list_value();
  for (auto size : map.saliency().shape()) sizes.add_values()->set_number_value(size);
  (*shape.mutable_fields())["largest"].set_number_value(*std::max_element(values.begin(), values.end()));
  Print("map", shape);
  Print("scores", Scores(map));

  // Score the map again, this time as a map from the caller.
  pb::EvaluateRequest evaluate;
  *evaluate.mutable_image() = request.image();
  *evaluate.mutable_saliency() = map.saliency();
  evaluate.mutable_target()->set_index(map.target().index());
  evaluate.add_metrics()->set_name("average-drop");
  pb::MetricSpec& insertion = *evaluate.add_metrics();
  insertion.set_name("insertion");
  (*insertion.mutable_parameters()->mutable_fields())["steps"].set_number_value(4);
  pb::EvaluateResponse evaluated;
  if (auto status = stub->Evaluate(Context().get(), evaluate, &evaluated); !status.ok()) {
    Print("failed", Describe(status));
    return 1;
  }
  Print("evaluated", Scores(evaluated.map()));

  request.mutable_method()->set_name("opti-cam");
  (*request.mutable_method()->mutable_parameters()->mutable_fields())["steps"].set_number_value(0);
  Print("error", Describe(stub->Explain(Context().get(), request, &explained)));
}
