// Vercel's ai with @ai-sdk/openai-compatible: text, stream, objects, tools in two steps.
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { Output, generateText, stepCountIs, streamText, tool } from "ai";
import { z } from "zod";
import { BASE, MODEL, QUESTION, check, run } from "./recipes.mjs";

const provider = createOpenAICompatible({
  name: "octavo", baseURL: BASE, apiKey: "x", includeUsage: true, supportsStructuredOutputs: true,
});
const ask = { model: provider(MODEL), prompt: QUESTION, temperature: 0, maxOutputTokens: 24, maxRetries: 0 };
const city = z.object({ name: z.string().max(20), large: z.boolean() });

await run({
  async generate_text() {
    const { text, usage } = await generateText(ask);
    check(text.includes("Paris") && usage.outputTokens <= 24, [text, usage]);
  },
  async stream_text() {
    const result = streamText(ask);
    const parts = [];
    for await (const part of result.textStream) parts.push(part);
    check(parts.length > 3 && parts.join("").includes("Paris") && (await result.usage).outputTokens > 0, parts);
  },
  async output_object() {
    const { output } = await generateText({ ...ask, maxOutputTokens: 64, output: Output.object({ schema: city }) });
    check(city.safeParse(output).success, output);
  },
  async tools_in_two_steps() {
    let asked = 0;
    const weather = tool({
      description: "The weather in a city.", inputSchema: z.object({ city: z.string().max(30) }),
      execute: async () => { asked += 1; return { weather: "sunny" }; },
    });
    const { steps, text } = await generateText({
      ...ask, maxOutputTokens: 64, tools: { weather }, stopWhen: stepCountIs(2),
      // The second time the model is to answer: this one would go on calling as long as it must.
      prepareStep: ({ stepNumber }) => ({ toolChoice: stepNumber === 0 ? "required" : "none" }),
    });
    check(asked === 1 && steps.length === 2 && text.length > 0, steps);
  },
});
