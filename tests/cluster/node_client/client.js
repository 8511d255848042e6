// Calls a server whose .proto files it has never seen: what it needs, it asks the server's reflection service for.
// Usage: node client.js ADDRESS PROMPT. Prints one JSON object.
const grpc = require("@grpc/grpc-js");
const { GrpcReflection } = require("grpc-js-reflection-client");

const SERVICE = "twinring.v1.Inference";
const [address, prompt] = process.argv.slice(2);
const deadline = () => ({ deadline: Date.now() + 30_000 });

function ask(stub, method, request) {
  return new Promise((resolve, reject) =>
    stub[method](request, deadline(), (error, answer) => (error ? reject(error) : resolve(answer))),
  );
}

async function generate(stub, request) {
  const parts = [];
  for await (const response of stub.Generate(request, deadline())) {
    parts.push(response.chunk ?? response.complete);
  }
  const last = parts[parts.length - 1];
  const tokenIds = parts.flatMap((part) => {
    const bytes = part.token_ids;
    return Array.from({ length: bytes.length / 4 }, (_, index) => bytes.readInt32LE(4 * index));
  });
  return { text: parts.map((part) => part.text).join(""), tokenIds, finishReason: last.finish_reason };
}

async function main() {
  const credentials = grpc.credentials.createInsecure();
  const reflection = new GrpcReflection(address, credentials);
  const services = await reflection.listServices();
  const methods = (await reflection.listMethods(SERVICE)).map((method) => method.name);
  const descriptor = await reflection.getDescriptorBySymbol(SERVICE);
  const options = { keepCase: true, defaults: true, oneofs: true, longs: String, enums: String };
  const stub = new (descriptor.getPackageObject(options).twinring.v1.Inference)(address, credentials);
  const info = await ask(stub, "GetModelInfo", {});
  const route = await ask(stub, "ExplainRoute", { text: prompt });
  const sampling_params = { max_tokens: 12, temperature: 0 };
  const answer = await generate(stub, { text: prompt, stream: true, sampling_params });
  let refusal = "";
  await generate(stub, { chat: { messages: [] } }).catch((error) => (refusal = error.details));
  console.log(JSON.stringify({ services, methods, info, route, answer, refusal }));
  stub.close();
}

main().then(
  () => process.exit(0),
  (error) => {
    console.error(error);
    process.exit(1);
  },
);
