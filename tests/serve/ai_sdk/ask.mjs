// Asks as a program with the AI SDK does: node ask.mjs CASE. Prints one line of JSON.
import { createOpenAICompatible } from '@ai-sdk/openai-compatible';
import { Output, generateObject, generateText, isStepCount, streamText, tool } from 'ai';
import { z } from 'zod';

const provider = createOpenAICompatible({
  name: 'eft',
  baseURL: process.env.BASE_URL,
  apiKey: process.env.API_KEY,
  supportsStructuredOutputs: true,
  includeUsage: true,
});
const asked = { prompt: 'What is the capital of Peru?', temperature: 0, maxOutputTokens: 64, maxRetries: 0 };
const plain = { ...asked, model: provider('eft') };
const Answer = z.object({ city: z.enum(['Lima', 'Quito']), sure: z.boolean() });
const weather = tool({
  description: 'The weather of a city.',
  inputSchema: z.object({ city: z.enum(['Lima', 'Quito']) }),
  execute: async ({ city }) => `It rains in ${city}.`,
});
const structured = { ...plain, maxOutputTokens: 1024 }; // an untrained model indents as far as the grammar lets it
const withTool = {
  ...structured,
  model: provider('tools'),
  tools: { weather },
  providerOptions: { eft: { parallel_tool_calls: false } },
};

async function gathered(stream) {
  const parts = [];
  for await (const part of stream) parts.push(part);
  return parts;
}

const cases = {
  async text() {
    const { text, usage, finishReason } = await generateText(plain);
    return { text, usage, finishReason };
  },
  async stream() {
    const result = streamText(plain);
    const texts = await gathered(result.textStream);
    return { texts, usage: await result.usage, finishReason: await result.finishReason };
  },
  async completion() {
    const { text } = await generateText({ ...plain, model: provider.completionModel('eft') });
    return { text };
  },
  async object() {
    const { object } = await generateObject({ ...structured, schema: Answer });
    return { object };
  },
  async output() {
    const { output } = await generateText({ ...structured, output: Output.object({ schema: Answer }) });
    return { object: output };
  },
  async streamedOutput() {
    const result = streamText({ ...structured, output: Output.object({ schema: Answer }) });
    await gathered(result.partialOutputStream);
    return { object: await result.output };
  },
  async tool() {
    // The first step has to call the tool, the second one reads what it said.
    const { steps } = await generateText({
      ...withTool,
      stopWhen: isStepCount(2),
      prepareStep: ({ stepNumber }) => ({ toolChoice: stepNumber === 0 ? 'required' : 'none' }),
    });
    return steps.map(({ toolCalls, toolResults, usage, finishReason }) => ({
      inputs: toolCalls.map((call) => call.input),
      outputs: toolResults.map((result) => result.output),
      inputTokens: usage.inputTokens,
      finishReason,
    }));
  },
  async streamedTool() {
    const result = streamText({ ...withTool, toolChoice: { type: 'tool', toolName: 'weather' } });
    const parts = await gathered(result.stream ?? result.fullStream);
    return { types: parts.map((part) => part.type), inputs: (await result.toolCalls).map((call) => call.input) };
  },
  async refused() {
    try {
      await generateText({ ...plain, model: provider('nobody') });
    } catch (error) {
      return { name: error.name, status: error.statusCode, message: error.message, retryable: error.isRetryable };
    }
  },
};

console.log(JSON.stringify(await cases[process.argv[2]]()));
