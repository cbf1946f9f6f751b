// openai for Node: create, stream, the stream helper, typed answers, tools, responses, errors.
import OpenAI from "openai";
import { zodResponseFormat } from "openai/helpers/zod";
import { z } from "zod";
import { BASE, MODEL, PARAMETERS, QUESTION, check, run } from "./recipes.mjs";

const client = new OpenAI({ baseURL: BASE, apiKey: "x", maxRetries: 0, timeout: 60000 });
const ask = { model: MODEL, messages: [{ role: "user", content: QUESTION }], max_tokens: 16, temperature: 0 };
const tools = [{ type: "function", function: { name: "get_weather", parameters: PARAMETERS } }];

await run({
  async models() {
    const ids = [];
    for await (const model of client.models.list()) ids.push(model.id);
    check(ids.includes(MODEL), ids);
  },
  async create() {
    const answer = await client.chat.completions.create(ask);
    check(answer.choices[0].message.content.includes("Paris") && answer._request_id, answer);
  },
  async stream() {
    let text = "", usage = null;
    for await (const chunk of await client.chat.completions.create({ ...ask, stream: true, stream_options: { include_usage: true } })) {
      text += chunk.choices[0]?.delta?.content ?? "";
      usage = chunk.usage ?? usage;
    }
    check(text.includes("Paris") && usage.completion_tokens <= 16, [text, usage]);
  },
  async stream_helper() {
    const stream = client.chat.completions.stream(ask);
    let text = "";
    stream.on("content", (delta) => { text += delta; });
    const final = await stream.finalChatCompletion();
    check(text === final.choices[0].message.content && text.includes("Paris"), final);
  },
  async parse() {
    const city = z.object({ name: z.string().max(20), large: z.boolean() });
    const answer = await client.chat.completions.parse({ ...ask, max_tokens: 64, response_format: zodResponseFormat(city, "city") });
    check(typeof answer.choices[0].message.parsed.name === "string", answer);
  },
  async tools() {
    const stream = client.chat.completions.stream({ ...ask, max_tokens: 64, tools, tool_choice: "required" });
    const { message, finish_reason } = (await stream.finalChatCompletion()).choices[0];
    check(finish_reason === "tool_calls" && "city" in JSON.parse(message.tool_calls[0].function.arguments), message);
  },
  async responses() {
    const body = { model: MODEL, input: QUESTION, max_output_tokens: 16, temperature: 0 };
    const answer = await client.responses.create(body);
    let text = "";
    for await (const event of await client.responses.create({ ...body, stream: true })) {
      if (event.type === "response.output_text.delta") text += event.delta;
    }
    check(answer.output_text.includes("Paris") && text === answer.output_text, [answer, text]);
  },
  async errors() {
    const error = await client.chat.completions.create({ ...ask, model: "nobody" }).then(() => null, (caught) => caught);
    check(error instanceof OpenAI.NotFoundError && error.code === "model_not_found", error);
  },
});
