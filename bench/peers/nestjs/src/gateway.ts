// HTTP in, a question to the service over Kafka, its answer out: NestJS' request-reply with ClientKafka, on Fastify.
import 'reflect-metadata';
import { Body, Controller, Get, Inject, Module, OnModuleInit, Param, Post } from '@nestjs/common';
import { NestFactory } from '@nestjs/core';
import { ClientKafka, ClientsModule, Transport } from '@nestjs/microservices';
import { FastifyAdapter, NestFastifyApplication } from '@nestjs/platform-fastify';

@Controller()
class EpisodesController implements OnModuleInit {
  constructor(@Inject('EPISODES') private readonly client: ClientKafka) {}

  async onModuleInit() {
    this.client.subscribeToResponseOf('nestjs.episodes');
    await this.client.connect();
  }

  @Get('healthz')
  health() {
    return { status: 'ok' };
  }

  @Post('namespaces/:slug/projects/:project/episodes')
  upsert(@Param('slug') slug: string, @Param('project') project: string, @Body() body: object) {
    return this.client.send('nestjs.episodes', { key: slug, value: { slug, project, ...body } });
  }
}

@Module({
  imports: [
    ClientsModule.register([
      {
        name: 'EPISODES',
        transport: Transport.KAFKA,
        options: {
          client: { clientId: 'gateway', brokers: [process.env.BROKER!] },
          consumer: { groupId: 'nestjs-gateway' },
        },
      },
    ]),
  ],
  controllers: [EpisodesController],
})
class GatewayModule {}

async function main() {
  const app = await NestFactory.create<NestFastifyApplication>(GatewayModule, new FastifyAdapter(), {
    logger: ['error', 'warn'],
  });
  await app.listen(Number(process.env.PORT), '127.0.0.1');
}

void main();
